"""The soak's shorter form: half a minute of everything at once, with kills."""

from __future__ import annotations

from sun_client.server import Server
from sun_perf.soak import Soak
from tests.server.conftest import free_ports


def test_under_mixed_load_and_kills_every_answer_is_right_and_nothing_is_left(root):
    with Server(root, free_ports()) as server:
        soak = Soak(server, ["bash", "identity"], lambda line: None)
        soak.refer()
        report = soak.run(20.0, kill_every=10.0)
        server.stop(drain_s=0)
    assert report["wrong"] == []
    assert report["idle_at_the_end"] and server.leftovers() == []
    assert report["counts"]["kills"] == 2 and report["counts"]["answered"] > 10
