"""A running vLLM server (docs/rollout.md says how to start it) as a backend of VllmEngine, over HTTP.

    load      label the server with a new weight version, then bring the weights: through a folder that both see, and
              reload_weights; or by NCCL (vLLM's weight transfer; CUDA only, not measured)
    complete  /v1/completions, one request a prompt, max_num_seqs samples at a time; then ask for the version again

A server that was started again has another version: all that was sampled since the push is thrown away. The label comes
first, so that no crash during a push can leave old weights under a new label. Generation is a function of weights and
seeds, so a request that got no answer is simply sent again: after 1, 2, 4, .. 30 s, for `timeout_s` seconds.
"""

import base64
import io
import json
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
from torch import Tensor

from r1fast.models.decoder import Decoder
from r1fast.models.weights import save_model, to_hf_names
from r1fast.rollout.sampling import SampledTokens
from r1fast.rollout.vllm import MAX_PUSHES, RolloutError, WeightsLostError, whole_state

LONGEST_WAIT_S = 30.0
RPC = "/collective_rpc"
ADVICE = {
    404: "; vLLM has it under VLLM_SERVER_DEV_MODE=1: start the server as docs/rollout.md says",
    500: "; does it serve a model of this architecture? It must be started again after this",
}


class Client:
    """JSON over HTTP, with patience. Raises RolloutError that names the URL, what failed and what to do."""

    def __init__(self, url: str, *, timeout_s: float, request_timeout_s: float) -> None:
        """timeout_s: from the first failure of a request on. request_timeout_s: for one answer."""
        self.url, self.timeout_s, self.request_timeout_s = url.rstrip("/"), timeout_s, request_timeout_s
        self._opener = build_opener(ProxyHandler({}))  # the server is of this cluster, whatever http_proxy says

    def get(self, path: str) -> Any:
        return self._call("GET", path)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._call("POST", path, body)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        what = f"vLLM server {self.url}: {method} {path}"
        wait_s, first_failure_s, tries = 1.0, 0.0, 0
        while True:
            try:
                with self._opener.open(request, timeout=self.request_timeout_s) as response:
                    content = response.read()
                return json.loads(content) if content else None
            except HTTPError as error:
                reason = f"status {error.code}: {_message(error)}"
                # A worker that cannot take the weights answers 500, and would again.
                if error.code < 500 or (error.code == 500 and path == RPC):
                    raise RolloutError(f"{what}: {reason}{ADVICE.get(error.code, '')}") from error
            except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
                reason = str(error) or type(error).__name__
                if isinstance(getattr(error, "reason", error), TimeoutError):
                    reason = f"no answer within {self.request_timeout_s:g} s (rollout.vllm.request_timeout)"
            tries, now = tries + 1, monotonic()
            first_failure_s = first_failure_s or now
            if now + wait_s - first_failure_s > self.timeout_s:
                raise RolloutError(
                    f"{what} failed {tries} times in a row, at last with: {reason}. Is it running, and reachable from "
                    "here? Start it as docs/rollout.md says; a run that had begun goes on with --resume. "
                    "rollout.vllm.server_timeout is how long a run waits for it"
                )
            sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _message(error: HTTPError) -> str:
    """What vLLM says, on one line; whatever else answers may say anything."""
    text = error.read().decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return " ".join(str(text).split())[:300] or error.reason


def server_problems(client: Client, *, routed_experts: bool) -> Iterator[str]:
    """What a server's settings make impossible."""
    settings = client.get("/server_info?config_format=json")["vllm_config"]
    mode = settings["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        expected = "expected processed_logprobs, those of the tempered distribution"
        yield f"{client.url} returns {mode}, {expected}; start it with --logprobs-mode processed_logprobs"
    if settings.get("speculative_config") is not None:
        yield f"{client.url} decodes speculatively, with a draft model that never gets new weights; start it without"
    if routed_experts and not settings["aux_output_config"]["enable_return_routed_experts"]:
        text = "does not return routed experts, which router_replay needs; start it with --enable-return-routed-experts"
        yield f"{client.url} {text}"


@dataclass
class Server:
    """Backend of VllmEngine, for one process: the requests of all ranks go through it."""

    client: Client
    folder: Path | None  # where weights are put for the server to read; None sends them by NCCL
    max_num_seqs: int
    version: str = ""
    _sender: Any = None  # of NCCL

    def load(self, model: Decoder, *, zero_first: bool) -> None:
        if self._sender is not None and not self._has_version():
            self._sender = None  # its group died with the server
        self.version = f"r1fast-{uuid.uuid4().hex}"
        self.client.post("/update_weight_version", {"new_version": self.version})
        if zero_first:
            self.client.post(RPC, {"method": "reset_weights"})
        if self.folder is None:
            self._sender = self._sender or _nccl_sender(self.client, model)
            self._sender.send_weights()
        else:
            save_model(model.config, whole_state(model), self.folder, overwrite=True)
            self.client.post(RPC, {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder.absolute())}})
        if not self.client.post("/reset_prefix_cache")["success"]:
            text = "did not drop its prefix cache: requests of another client run in it"
            raise RolloutError(f"vLLM server {self.client.url} {text}")

    def complete(self, prompts: Sequence[list[int]], requests: Sequence[dict[str, Any]]) -> list[list[SampledTokens]]:
        pool = ThreadPoolExecutor(max(1, self.max_num_seqs // requests[0]["n"]))
        try:
            outputs = list(pool.map(self._one, prompts, requests))
        finally:
            pool.shutdown(cancel_futures=True)
        if not self._has_version():
            raise WeightsLostError(
                f"vLLM server {self.client.url} lost its weights while it sampled, {MAX_PUSHES} times: it was started "
                "again each time, or another run pushes to it"
            )
        return outputs

    def rest(self) -> None:
        """A server keeps its memory."""

    def _has_version(self) -> bool:
        return self.client.get("/weight_info")["weight_version"] == self.version

    def _one(self, prompt: list[int], parameters: dict[str, Any]) -> list[SampledTokens]:
        ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}  # texts are decoded here
        answer = self.client.post("/v1/completions", {"prompt": prompt, **parameters, **ids})
        return [_sampled(choice) for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]


def _sampled(choice: dict[str, Any]) -> SampledTokens:
    encoded = choice.get("routed_experts")
    experts = None if encoded is None else np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
    return SampledTokens(choice["token_ids"], choice["logprobs"]["token_logprobs"], experts, choice["finish_reason"])


def _nccl_sender(client: Client, model: Decoder) -> Any:
    """vLLM's own trainer side: it broadcasts while the server receives. Not measured: it needs two GPUs."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.utils.network_utils import get_ip, get_open_port

    class Source(WeightSource):
        """The gathered weights of now, each time it is iterated."""

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(to_hf_names(whole_state(model), model.config, tied=model.config.tie_word_embeddings).items())

    size = 1 + client.get("/get_world_size")["world_size"]
    here = NCCLTrainerInitInfo(master_address=get_ip(), master_port=get_open_port(), world_size=size, rank=0)
    remote = HTTPVLLMWeightSyncClient(client.url, timeout=client.request_timeout_s)
    return WeightTransferTrainerFactory.trainer_init(here, client=remote, source=Source())
