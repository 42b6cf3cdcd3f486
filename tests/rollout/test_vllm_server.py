"""The client of a vLLM server against one that answers as it is told: retries, versions, and the texts of errors."""

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1fast import SamplingParams, load_model
from r1fast.rollout import vllm_server
from r1fast.rollout.vllm import RolloutError, WeightsLostError, request
from r1fast.rollout.vllm_server import Client, Server, server_problems

SETTINGS = {
    "model_config": {"logprobs_mode": "processed_logprobs"},
    "speculative_config": None,
    "aux_output_config": {"enable_return_routed_experts": False},
}
EXPERTS = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)


class FakeVllm:
    """Keeps a weight version as vLLM does; answers[path], if set, makes the answer to the n-th request of that path."""

    def __init__(self) -> None:
        self.version = "default"
        self.calls: list[tuple[str, Any]] = []
        self.answers: dict[str, Callable[[int], tuple[int, Any] | None]] = {}
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"] or 0)
                self._answer(json.loads(self.rfile.read(length)) if length else None)

            def _answer(self, body: Any) -> None:
                path = self.path.partition("?")[0]
                with fake.lock:
                    fake.calls.append((path, body))
                    number = sum(called == path for called, _ in fake.calls)
                    fake.at_once += 1
                    fake.most_at_once = max(fake.most_at_once, fake.at_once)
                found = fake.answers[path](number) if path in fake.answers else None
                status, content = found or fake.usual(path, body)
                with fake.lock:
                    fake.at_once -= 1
                if status == 0:  # die in the middle of an answer
                    self.connection.close()
                    return
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = False  # closing waits for them
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # of clients that have gone
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def usual(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/v1/completions":
            n = body["n"]
            return 200, {"choices": [choice(i, body["seed"]) for i in reversed(range(n))]}
        known = {
            "/update_weight_version": {"success": True},
            "/weight_info": {"weight_version": self.version},
            "/collective_rpc": {"results": [None]},
            "/reset_prefix_cache": {"success": True},
            "/server_info": {"vllm_config": SETTINGS},
        }
        return (200, known[path]) if path in known else (404, {"detail": "Not Found"})

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]


def choice(index: int, seed: int) -> dict[str, Any]:
    file = io.BytesIO()
    np.save(file, EXPERTS)
    return {
        "index": index,
        "token_ids": [seed + index, 1],
        "logprobs": {"token_logprobs": [-0.5 - index, -1.0]},
        "finish_reason": "stop",
        "routed_experts": base64.b64encode(file.getvalue()).decode(),
    }


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    fake = FakeVllm()
    yield fake
    fake.http.shutdown()
    fake.http.server_close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between tries pass at once, on a clock of their own; the list records them."""
    waited: list[float] = []
    start = time.monotonic()
    monkeypatch.setattr(vllm_server, "sleep", waited.append)
    monkeypatch.setattr(vllm_server, "monotonic", lambda: start + sum(waited))
    return waited


def client(url: str, timeout_s: float = 240.0, request_timeout_s: float = 20.0) -> Client:
    return Client(url + "/", timeout_s=timeout_s, request_timeout_s=request_timeout_s)


def server(fake: FakeVllm, tmp_path: Path, max_num_seqs: int = 8) -> Server:
    return Server(client(fake.url), folder=tmp_path / "weights", max_num_seqs=max_num_seqs)


def requests(seeds: list[int], n: int = 2) -> list[dict[str, Any]]:
    return [request(SamplingParams(n=n, max_tokens=4), seed, [1]) for seed in seeds]


def test_a_request_is_sent_again_until_it_is_answered(fake: FakeVllm, waits: list[float]) -> None:
    fake.answers["/weight_info"] = lambda number: {1: (0, None), 2: (503, {}), 3: (500, {})}.get(number)
    assert client(fake.url).get("/weight_info") == {"weight_version": "default"}
    assert waits == [1, 2, 4]


def test_a_dead_server_is_named_with_what_to_do(waits: list[float]) -> None:
    with socket.socket() as unused:  # bound and not listening: nobody else gets the port
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(RolloutError) as caught:
            client(url, timeout_s=100.0).post("/v1/completions", {"prompt": [1]})
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    text = str(caught.value)
    assert text.startswith(f"vLLM server {url}: POST /v1/completions failed 8 times in a row, at last with: ")
    assert "Connection refused" in text and "docs/rollout.md" in text and "--resume" in text


def test_a_late_answer_is_an_error_that_names_the_limit(fake: FakeVllm) -> None:
    fake.answers["/v1/completions"] = lambda _: time.sleep(0.5)  # type: ignore[func-returns-value]
    late = client(fake.url, timeout_s=0.0, request_timeout_s=0.2)
    with pytest.raises(RolloutError, match=r"no answer within 0\.2 s \(rollout\.vllm\.request_timeout\)"):
        late.post("/v1/completions", {"n": 1, "seed": 0})


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        (
            "/reset_prefix_cache",
            (404, {"detail": "Not Found"}),
            "404: .*VLLM_SERVER_DEV_MODE=1: start the server as docs",
        ),
        (
            "/v1/completions",
            (400, {"error": {"message": "max_tokens is\n too large"}}),
            "400: max_tokens is too large$",
        ),
        (
            "/collective_rpc",
            (500, {"error": {"message": "no module named x"}}),
            "500: no module named x; does it serve",
        ),
    ],
    ids=["no-dev-mode", "bad-request", "weights-do-not-fit"],
)
def test_a_refusal_is_not_tried_again(fake: FakeVllm, waits: list[float], path: str, answer: Any, message: str) -> None:
    fake.answers[path] = lambda _: answer
    with pytest.raises(RolloutError, match=message):
        client(fake.url).post(path, {})
    assert waits == [] and len(fake.calls) == 1


def test_load_labels_first_and_drops_the_prefix_cache(fake: FakeVllm, tmp_path: Path, base_model: Path) -> None:
    model, _ = load_model(base_model, dtype="float32")
    pushed = server(fake, tmp_path)
    pushed.load(model, zero_first=True)
    rpc = "/collective_rpc"
    assert fake.paths() == ["/update_weight_version", rpc, rpc, "/reset_prefix_cache"]
    assert [body["method"] for path, body in fake.calls if path == rpc] == ["reset_weights", "reload_weights"]
    folder = fake.calls[2][1]["kwargs"]["weights_path"]
    assert Path(folder).is_absolute()
    stored, _ = load_model(folder, dtype="float32")
    assert all(stored.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())

    before, fake.calls[:] = fake.version, []
    pushed.load(model, zero_first=False)
    assert fake.paths() == ["/update_weight_version", rpc, "/reset_prefix_cache"] and fake.version != before


def test_a_prefix_cache_that_stays_is_an_error(fake: FakeVllm, tmp_path: Path, base_model: Path) -> None:
    fake.answers["/reset_prefix_cache"] = lambda _: (200, {"success": False})
    with pytest.raises(RolloutError, match="did not drop its prefix cache"):
        server(fake, tmp_path).load(load_model(base_model, dtype="float32")[0], zero_first=False)


def test_samples_come_in_order_each_prompt_with_its_seed(fake: FakeVllm, tmp_path: Path) -> None:
    asked = server(fake, tmp_path)
    asked.version = fake.version
    outputs = asked.complete([[5], [6, 7], [8]], requests([10, 20, 30]))
    assert [[sample.token_ids for sample in group] for group in outputs] == [
        [[seed, 1], [seed + 1, 1]] for seed in (10, 20, 30)
    ]
    assert outputs[0][1].logprobs == [-1.5, -1.0] and outputs[0][1].finish_reason == "stop"
    assert np.array_equal(outputs[2][0].routed_experts, EXPERTS)
    bodies = {tuple(body["prompt"]): body for path, body in fake.calls if path == "/v1/completions"}
    assert bodies[6, 7]["seed"] == 20 and bodies[6, 7]["return_token_ids"] and bodies[6, 7]["logprobs"] == 0


def test_max_num_seqs_bounds_what_runs_at_once(fake: FakeVllm, tmp_path: Path) -> None:
    fake.answers["/v1/completions"] = lambda _: time.sleep(0.05)  # type: ignore[func-returns-value]
    asked = server(fake, tmp_path, max_num_seqs=8)
    asked.version = fake.version
    asked.complete([[i] for i in range(12)], requests(list(range(12)), n=4))
    assert fake.most_at_once == 2


def test_a_server_started_again_loses_the_weights(fake: FakeVllm, tmp_path: Path) -> None:
    asked = server(fake, tmp_path)
    asked.version = "r1fast-1"
    with pytest.raises(WeightsLostError, match="started again each time"):
        asked.complete([[5]], requests([1]))


def test_one_prompt_that_fails_ends_all(fake: FakeVllm, tmp_path: Path) -> None:
    fake.answers["/v1/completions"] = lambda number: (400, {"error": {"message": "bad"}}) if number == 1 else None
    asked = server(fake, tmp_path, max_num_seqs=2)
    with pytest.raises(RolloutError, match="400: bad"):
        asked.complete([[i] for i in range(50)], requests(list(range(50))))
    assert len(fake.calls) < 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_config": {"logprobs_mode": "raw_logprobs"}}, "returns raw_logprobs, expected processed_logprobs"),
        ({"speculative_config": {"method": "ngram"}}, "decodes speculatively"),
        ({}, "does not return routed experts, which router_replay needs"),
    ],
)
def test_settings_of_the_server_that_cannot_be(fake: FakeVllm, change: dict, message: str) -> None:
    fake.answers["/server_info"] = lambda _: (200, {"vllm_config": {**SETTINGS, **change}})
    problems = list(server_problems(client(fake.url), routed_experts=True))
    assert len(problems) == (1 if not change else 2)
    assert message in problems[0] and fake.url in problems[0]


def test_a_well_started_server_has_no_problem(fake: FakeVllm) -> None:
    assert list(server_problems(client(fake.url), routed_experts=False)) == []
