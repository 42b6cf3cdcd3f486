"""What a stage generates with: the engine of this project, or vLLM, in process or as a server."""

from typing import Any

from r1fast.config import ConfigError
from r1fast.models.decoder import Decoder
from r1fast.parallel.mesh import Dist
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.vllm import Backend, RolloutError, VllmEngine
from r1fast.rollout.vllm_process import InProcess
from r1fast.rollout.vllm_server import Client, Server
from r1fast.stages.context import StageContext

WEIGHTS = "rollout_weights"  # folder of the run directory, written anew at every push to a server


def build_engine(ctx: StageContext, model: Decoder, tokenizer: Any, *, record: bool) -> RolloutEngine | VllmEngine:
    """record: completions of a mixture of experts say which experts each token went to (vLLM's: for router_replay)."""
    rollout = ctx.recipe.rollout
    if rollout.engine == "r1fast":
        own = rollout.model_dump(exclude={"engine", "async_steps", "vllm"})
        routed = record and any(True for _ in model.moe_layers())
        return RolloutEngine(model, tokenizer, enable_return_routed_experts=routed, **own)
    try:
        backend = vllm_backend(ctx, model)
    except RolloutError as error:
        raise ConfigError(f"stages.{ctx.stage.name}: {error}") from error
    return VllmEngine(model, tokenizer, backend, routed_experts=record and ctx.stage.router_replay)


def vllm_backend(ctx: StageContext, model: Decoder) -> Backend:
    rollout, options = ctx.recipe.rollout, ctx.recipe.rollout.vllm
    if (url := options.server_base_url) is not None:
        client = Client(url, timeout_s=options.server_timeout, request_timeout_s=options.request_timeout)
        folder = ctx.run_dir / WEIGHTS if options.weight_transfer == "folder" else None
        return Server(client, folder=folder, max_num_seqs=rollout.max_num_seqs)
    ctx.dist.before_close.callback(InProcess.release)
    return InProcess.get(
        model.config, ctx.param_dtype, ctx.dist.device, max_num_seqs=rollout.max_num_seqs,
        max_model_len=options.max_model_length, gpu_memory_utilization=options.gpu_memory_utilization,
        enforce_eager=rollout.enforce_eager,
        enable_return_routed_experts=any(getattr(stage, "router_replay", False) for stage in ctx.recipe.stages),
    )  # fmt: skip


def share_of(engine: RolloutEngine | VllmEngine, num_rows: int, dist: Dist) -> range:
    """This rank's rows; where one server samples for every rank, rank 0 alone talks to it."""
    if isinstance(engine, VllmEngine) and isinstance(engine.backend, Server):
        return range(num_rows if dist.is_main else 0)
    return range(dist.rank, num_rows, dist.world_size)
