"""What the soak calls a leak."""

from __future__ import annotations

from sun_perf.soak import GROWTH, too_much


def test_growth_is_judged_and_what_triton_keeps_of_the_killed_is_not_ours():
    still = dict.fromkeys(GROWTH, 0)
    assert too_much(still, kills=0) == {} == too_much({**still, "server_threads": 70}, kills=2)
    assert too_much({**still, "server_threads": 70, "router_mib": 40}, kills=1) == {"server_threads": 70, "router_mib": 40}
