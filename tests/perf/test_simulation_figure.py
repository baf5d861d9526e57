"""The growth figure shows all of its points, and a token's cost is a step's time over its sequences."""

from __future__ import annotations

from itertools import product

from sun_perf.simulation.calibration import Calibration
from sun_perf.simulation.costs import StepRow
from sun_perf.simulation_figure import ALPHAS, RATE_PER_TASK, RATES, TASKS, TASKS_BY_RATE, figure_of, token_costs
from tests.perf.test_figures import cut_off

STEPS = [StepRow(scheme, threads, batch, context, batch * ms) for scheme, threads, ms in (("fp32", 1, 30.0), ("int8", 1, 10.0), ("fp32", 2, 20.0))
         for batch in (1, 8) for context in (128, 512)]
MEASURED = Calibration(machine={}, commit="none", steps=STEPS, prefill=[], token_budget=512)


def point(tasks: int, alpha: float, rate_per_task: float) -> dict[str, float]:
    """As `simulation_figure.point` makes it; throughput and ratio are highest at the greatest skew."""
    return {"tasks": tasks, "alpha": alpha, "rate_per_task": rate_per_task, "sun_workers": 1, "partitioned_workers": tasks * (1 + alpha),
            "sun_requests_per_s_per_worker": 1 + alpha, "partitioned_requests_per_s_per_worker": 0.5}


def test_all_points_lie_inside_their_panels():
    points = [point(*at) for at in {*product(TASKS, ALPHAS, [RATE_PER_TASK]), *product([TASKS_BY_RATE], ALPHAS, RATES)}]
    figure = figure_of({"points": points, "token_costs": token_costs(MEASURED, "fp32")})
    assert cut_off(figure) == [] and [len(axes.lines) for axes in figure.axes[-2:]] == [2, 2]


def test_a_tokens_cost_is_of_the_workers_that_are_simulated():
    assert token_costs(MEASURED, "int8") == [{"batch": batch, "context": context, "ms_per_token": 10.0} for batch in (1, 8) for context in (128, 512)]
