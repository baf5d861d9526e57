"""The peers' bench without a peer: what it parses, counts and converts, and whose turn it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from sun_client.errors import ServerError
from sun_perf.peers import completions, gguf_files, plan, report
from sun_perf.peers.child import Child
from sun_perf.peers.duel import Load, duel
from sun_perf.peers.environment import Environment
from sun_perf.peers.prompts import TASKS, Prompts
from sun_perf.peers.system import System
from sun_perf.peers.wave import Wave, ratio, stream_wave, summary


def event(**fields: object) -> bytes:
    return f"data: {json.dumps(fields)}\n".encode()


TEXT, USED, DONE = event(choices=[{"text": "a"}]), event(choices=[], usage={"completion_tokens": 2}), b"data: [DONE]\n"


def test_prompts_take_turns_by_task_and_never_repeat():
    prompts = Prompts()
    asks = [ask for _ in range(20) for ask in prompts.take(10)]
    assert len({ask.text for ask in asks}) == len(asks)
    assert [ask.task for ask in asks[:5]] == [*TASKS, TASKS[0]]


def test_pieces_come_as_they_are_and_the_tokens_with_the_usage():
    assert list(completions.pieces([b": ping\n", TEXT, b"\n", TEXT, USED, DONE])) == [0, 0, 2]
    last = event(choices=[{"text": ""}], usage={"completion_tokens": 2})
    assert list(completions.pieces([TEXT, last, DONE])) == [0, 0, 2]


@pytest.mark.parametrize("lines, error", [
    ([TEXT, DONE], "usage"), ([TEXT, USED], "DONE"), ([TEXT, event(error={"message": "no room"})], "no room"), ([b"error: no room\n"], "no room")])
def test_a_stream_that_breaks_off_is_an_error(lines, error):
    with pytest.raises(RuntimeError, match=error):
        list(completions.pieces(lines))


def test_a_wave_counts_tokens_and_refuses_an_answer_of_another_length():
    asks = Prompts().take(4)
    wave = stream_wave(asks, lambda ask, tokens: iter([0] * tokens + [tokens]), 3)
    assert wave.tokens == 12 and len(wave.ttft_ms) == len(wave.tpot_ms) == 4
    with pytest.raises(RuntimeError, match="banking: 2 tokens came, 3"):
        stream_wave(asks[:1], lambda ask, tokens: iter([2]), 3)


def test_summary_and_ratio_are_medians():
    ours, theirs = [Wave(100, s, [1.0, 3.0], [2.0]) for s in (1.0, 2.0, 10.0)], [Wave(100, s) for s in (2.0, 8.0, 10.0)]
    assert summary(ours) == {
        "tokens_per_s": 50.0, "waves": [100.0, 50.0, 10.0], "ttft_ms": {"p50": 2.0, "p95": 3.0}, "tpot_ms": {"p50": 2.0, "p95": 2.0}}
    assert summary(theirs)["ttft_ms"] is None
    assert ratio(ours, theirs) == 2.0  # of the pairs 2, 4 and 1


class Fake(System):
    """Notes what it is told."""

    def __init__(self, name: str, notes: list[str]):
        self.name, self.notes = name, notes

    def start(self):
        pass

    def stop(self):
        pass

    def sessions(self):
        return []

    def freeze(self):
        self.notes.append(f"{self.name} frozen")

    def thaw(self):
        self.notes.append(f"{self.name} runs")

    def wave(self, asks, tokens):
        self.notes.append(f"{self.name} {len(asks)}")
        return Wave(len(asks) * tokens, 1.0)


def test_sides_take_turns_and_only_one_runs():
    notes: list[str] = []
    waves = duel(Fake("a", notes), Fake("b", notes), Load([2, 4], tokens=8, rounds=2), lambda line: None)
    assert {count: (len(a), len(b)) for count, (a, b) in waves.items()} == {2: (2, 2), 4: (2, 2)}
    runs = [f"{side} {count}" for count in (2, 2, 2, 4, 4) for side in "ab"]
    assert notes == ["a frozen", "b frozen", *(note for run in runs for note in (f"{run[0]} runs", run, f"{run[0]} frozen")), "a runs", "b runs"]


def test_report_takes_the_lowest_ratio_of_what_serves_several_tasks(tmp_path: Path):
    found = []
    for name, seconds in (("llama-models-f32", 4.0), ("llama-lora-f32", 2.0), ("llama-one-f32", 1.0), ("llama-lora-q8_0", 3.0)):
        found += report.rows(plan.VARIANTS[name], {count: ([Wave(64, 1.0)], [Wave(64, seconds)]) for count in (8, 16)})
    assert report.over_peer(found) == {"llama": 2.0}
    assert "| llama.cpp f32, adapters | fp32 | 64 / 32 = 2.00 |" in report.table(found)
    report.write({"rows": found}, tmp_path / "results" / "peers.json")
    assert (tmp_path / "results" / "peers.png").stat().st_size > 10_000


def test_unknown_names_are_refused(tmp_path: Path):
    assert {variant.peer for variant in plan.chosen(["vllm"], None)} == {"vllm"}
    with pytest.raises(ValueError, match="llama-lora-f8 unknown"):
        plan.chosen([], ["llama-lora-f8"])
    with pytest.raises(ValueError, match="peer: got 'ollama'"):
        Environment("ollama", tmp_path)


def test_a_missing_peer_says_how_to_install_it(tmp_path: Path):
    assert 'make peers ARGS="--setup llama"' in Environment("llama", tmp_path).missing
    assert Environment("transformers", tmp_path).missing is None


def test_a_child_that_ends_says_why(tmp_path: Path):
    child = Child([sys.executable, "-c", "raise SystemExit('error: no model')"], tmp_path / "log")
    with pytest.raises(ServerError, match="no model"):
        child.wait_healthy(9, limit_s=60)
    child.stop()


def test_a_child_that_lives_is_stopped(tmp_path: Path):
    child = Child([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log")
    child.stop()
    assert child.process.returncode is not None


class TestGguf:
    """One layer with two heads of 16 and one KV head."""

    WIDTH, HEADS, KV_HEADS, RANK = 32, 2, 1, 2

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        writer = gguf.GGUFWriter(tmp_path / "source.gguf", "llama")
        writer.add_head_count(self.HEADS)
        writer.add_head_count_kv(self.KV_HEADS)
        writer.add_token_list(["a", "b"])
        rng = np.random.default_rng(0)
        for name, rows in (("token_embd", 2), ("blk.0.attn_q", 32), ("blk.0.attn_k", 16), ("blk.0.ffn_down", 32)):
            writer.add_tensor(f"{name}.weight", rng.standard_normal((rows, self.WIDTH)).astype(np.float32))
        writer.add_tensor("blk.0.attn_norm.weight", np.ones(self.WIDTH, dtype=np.float32))
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
            write()
        return tmp_path / "source.gguf"

    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        folder, rng, tensors = tmp_path / "adapter", np.random.default_rng(1), {}
        folder.mkdir()
        for linear, rows in (("self_attn.q_proj", 32), ("self_attn.k_proj", 16), ("mlp.down_proj", 32)):
            for part, shape in (("A", (self.RANK, self.WIDTH)), ("B", (rows, self.RANK))):
                tensors[f"base_model.model.model.layers.0.{linear}.lora_{part}.weight"] = rng.standard_normal(shape).astype(np.float32)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"r": self.RANK, "lora_alpha": 4}))
        return folder

    @staticmethod
    def tensors(path: Path) -> dict[str, np.ndarray]:
        return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}

    def test_permute_puts_a_heads_halves_side_by_side(self):
        assert gguf_files.permute(np.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]

    def test_an_adapter_on_its_own_makes_the_merged_model(self, source, adapter, tmp_path):
        before = self.tensors(source)
        merged = self.tensors(gguf_files.write_model(source, tmp_path / "merged.gguf", "f32", adapter))
        factors = self.tensors(gguf_files.write_adapter(source, tmp_path / "lora.gguf", adapter))
        for name, values in before.items():
            change = 2.0 * factors[f"{name}.lora_b"] @ factors[f"{name}.lora_a"] if f"{name}.lora_a" in factors else 0.0
            np.testing.assert_allclose(merged[name], values + change, rtol=1e-5, atol=1e-5)
        assert len(factors) == 6

    @pytest.mark.parametrize("precision, error", [("f32", 0.0), ("f16", 2e-3), ("q8_0", 0.03), ("q4_1", 0.3)])
    def test_precisions(self, source, tmp_path, precision, error):
        made = gguf_files.write_model(source, tmp_path / "made.gguf", precision)
        for name, values in self.tensors(made).items():
            assert np.abs(values - self.tensors(source)[name]).max() <= error, name
        assert gguf.GGUFReader(made).fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]

    def test_an_unknown_precision_is_refused(self, source, tmp_path):
        with pytest.raises(ValueError, match="precision: got 'q3'"):
            gguf_files.write_model(source, tmp_path / "made.gguf", "q3")
