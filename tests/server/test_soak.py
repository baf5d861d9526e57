"""The soak's shorter form, a quarter of a minute of everything at once, but for kills: `test_faults` has those."""

from __future__ import annotations

from sun_client.server import Server
from sun_perf.soak import Soak
from tests.server.conftest import free_ports


def test_under_mixed_load_every_answer_is_right_and_nothing_is_left(root):
    with Server(root, free_ports()) as server:
        soak = Soak(server, ["bash", "identity"], lambda line: None)
        soak.refer()
        report = soak.run(15.0, kill_every=1e6)
        server.stop(drain_s=0)
    assert report["wrong"] == []
    assert report["idle_at_the_end"] and server.leftovers() == []
    assert report["counts"]["answered"] > 10 and report["counts"].keys() == {"answered", "cancelled", "out of time", "refused"}
