"""What a stage will take of one rank's memory, phase by phase, from recipe and architecture alone (`--dry-run`).

P parameters, R ranks, b and r bytes of model.dtype and reduce_dtype, U parameters of an FSDP unit.

weights      4 P / R of what is trained, b P / R of a frozen one: the shards (parallel/parallelize.py); with `lora` the
             adapters are the P that is trained, of gradients and optimizer too
gathered     b P on one rank, and wherever tokens are sampled; else b (root unit + two layers, one on its way)
gradients    4 P / R; of the unit at work b U and twice r U beside it (FSDP copies them to be reduced, and the result)
optimizer    8 P / R (AdamW) or 4 of a matrix (Muon); where it is offloaded, the part that a step has brought
activations  what layers keep for the backward pass, and the most that one has at work: one of each kind is run, forward
             and backward, on tensors without memory (activations.py)
logits       the tiles of head.py, with the head's gradient, which is made in the forward pass; of a decode step all
cache        keys and values (rollout/engine.py), of full-length samples
graphs       what a decode step has at work, kept by the graphs' pool on CUDA

Sequences are taken to be as long as the recipe lets them be. Not counted: the process itself with its libraries, the
CUDA context (0.5 GB), what an allocator has free between tensors, and rewards.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich import box
from rich.table import Table

from r1fast.activations import Layer, layer_activations
from r1fast.config import ConfigError
from r1fast.models.cache import BlockCache, free_memory
from r1fast.models.decoder import Decoder, DecoderLayer
from r1fast.models.lora import LoraConfig, add_adapters
from r1fast.models.model_config import ModelConfig
from r1fast.parallel.optim import PART_NUMEL
from r1fast.parallel.parallelize import ONE_UNIT_NUMEL
from r1fast.preflight_models import architecture_of, checkpoint_of
from r1fast.rollout.scheduler import num_blocks_of
from r1fast.schema import GRPOStage, Recipe, RewardModelStage
from r1fast.schema_options import EvalOptions, FitOptions, LoraOptions, SampleOptions, StageBase, TrainOptions
from r1fast_kernels import head

ADVICE = {
    "activations": "lower max_tokens_per_microbatch, or set trainer.activation_checkpointing",
    "logits": "lower rollout.max_num_seqs",
    "cache": "lower rollout.max_num_seqs, or set rollout.kv_cache_memory_bytes",
    "optimizer": "take more ranks, or set trainer.offload",
}
TERMS = ("weights", "gathered", "gradients", "optimizer", "activations", "logits", "cache", "graphs")


@dataclass
class Phase:
    """The moment of a phase that needs most: bytes by term."""

    name: str
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass
class Estimate:
    """Of one stage on one rank. tokens_per_step: that all ranks learn from, at most; 0: the stage does not train."""

    stage: str
    tokens_per_step: int = 0
    phases: list[Phase] = field(default_factory=list)


class _Model:
    """Sizes of a decoder, of which a layer of each kind is built on meta."""

    def __init__(self, config: ModelConfig, lora: LoraOptions | None = None) -> None:
        self.config = config
        kinds = [(config.is_moe_layer(i), config.layer(i)) for i in range(config.num_hidden_layers)]
        self.kinds = [kinds.index(kind) for kind in kinds]  # of each layer: the first one of its kind
        shapes: dict[int, list[torch.Size]] = {}
        for i in set(self.kinds):
            with torch.device("meta"):
                shapes[i] = [x.shape for x in DecoderLayer(config, i).parameters()]
        self.layers = [sum(x.numel() for x in shapes[i]) for i in self.kinds]
        self.matrices = Counter(shape for i in self.kinds for shape in shapes[i] if len(shape) > 1)
        head = config.vocab_size * config.hidden_size
        self.root = head + config.hidden_size  # norm and head, and the embedding with them where it is tied
        self.numel = sum(self.layers) + self.root + (0 if config.tie_word_embeddings else head)
        self.adapters = 0 if lora is None else _adapters(config, lora)
        self.trained = self.numel if lora is None else self.adapters
        self.is_one_unit = self.numel <= ONE_UNIT_NUMEL
        self.largest_unit = self.numel if self.is_one_unit else max(*self.layers, self.root)

    def gathered(self, num_ranks: int) -> int:
        """Parameters that a rank has whole while it trains."""
        whole = self.is_one_unit or num_ranks == 1
        return self.numel if whole else min(self.root + 3 * max(self.layers), self.numel)


def _adapters(config: ModelConfig, lora: LoraOptions) -> int:
    with torch.device("meta"):
        decoder = Decoder(config)
    add_adapters(decoder, LoraConfig(**lora.model_dump(exclude={"merge_and_unload"})))
    return sum(x.numel() for x in decoder.parameters() if x.requires_grad)


class Estimator:
    """Of a recipe on `num_ranks` ranks, each with a device of this type."""

    def __init__(self, recipe: Recipe, num_ranks: int, device: str) -> None:
        self.recipe, self.ranks, self.device = recipe, num_ranks, device
        name = recipe.model.dtype if recipe.model.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
        self.dtype: torch.dtype = getattr(torch, name)

    def of_stage(self, stage: StageBase) -> Estimate | None:
        """None where the architecture is not known, which preflight has reported."""
        config = architecture_of(self.recipe, stage)
        if config is None:
            return None
        lora = stage.lora if isinstance(stage, TrainOptions) else None
        model, found = _Model(config, lora), Estimate(stage.name)
        frozen = [_Model(x) for x in self._frozen(stage) if x is not None]
        rest = self._resident(stage, model, frozen)
        # Frozen models are read after the optimizer is made. On one rank their gathered weights stay, once they ran.
        found.phases.append(Phase("load", rest if frozen else {"weights": rest["weights"]}))
        left = [] if self._offloads("reference") else frozen
        stays = {"gathered": self.dtype.itemsize * sum(x.gathered(self.ranks) for x in left)}
        if _samples(stage)[0]:
            generate = rest | self._generate(stage, model)
            generate["gathered"] += stays["gathered"]
            found.phases.append(Phase("generate", generate))
        if isinstance(stage, TrainOptions):
            num_tokens, num_batches, found.tokens_per_step = self._batch(stage)
            if isinstance(stage, GRPOStage) and (frozen or stage.num_updates() > stage.max_steps):
                found.phases.append(Phase("score", self._score(stage, model, frozen, rest, num_tokens)))
            found.phases.append(Phase("update", self._update(stage, model, frozen, rest, num_tokens, num_batches)))
            found.phases.append(Phase("save", rest | stays | {"optimizer": self._state(stage, model, offloads=False)}))
        return found

    # ---- what stays ----

    def _frozen(self, stage: StageBase) -> list[ModelConfig | None]:
        """The models beside the one that is trained or sampled from."""
        refs = []
        if isinstance(stage, GRPOStage):
            refs = [stage.ref_model] if stage.has_reference else []
            refs += [spec.model for spec in stage.reward_models.values()]
        return [self._config_of(ref, stage) for ref in refs]

    def _config_of(self, ref: str | None, stage: StageBase) -> ModelConfig | None:
        if ref is None:
            return architecture_of(self.recipe, stage)
        return architecture_of(self.recipe, self.recipe.stage(ref[1:])) if ref[0] == "@" else checkpoint_of(ref)[0]

    def _offloads(self, name: str) -> bool:
        return name in self.recipe.trainer.offload

    def _resident(self, stage: StageBase, model: _Model, frozen: list[_Model]) -> dict[str, int]:
        is_whole = isinstance(stage, TrainOptions) and stage.lora is None
        size = (4 if is_whole else self.dtype.itemsize) * model.numel + 4 * model.adapters
        first = 1 if self._offloads("reference") and isinstance(stage, GRPOStage) and stage.has_reference else 0
        size += self.dtype.itemsize * sum(other.numel for other in frozen[first:])
        found = {"weights": size // self.ranks}
        if isinstance(stage, TrainOptions):
            found["optimizer"] = self._state(stage, model, offloads=self._offloads("optimizer"))
        return found

    def _state(self, stage: TrainOptions, model: _Model, *, offloads: bool) -> int:
        if offloads:
            return 0
        muon = stage.optimizer == "muon"
        matrices = model.adapters or sum(model.layers) if muon else 0  # but for vectors and routers, which are few
        return (4 * matrices + 8 * (model.trained - matrices)) // self.ranks

    # ---- phases ----

    def _batch(self, stage: TrainOptions) -> tuple[int, int, int]:
        """Tokens of a full micro-batch, micro-batches of a step on a rank, tokens of a step in all."""
        if isinstance(stage, GRPOStage):
            length = stage.max_prompt_length + stage.max_completion_length - 1
            count = stage.prompts_per_step * stage.num_generations // stage.steps_per_generation
        else:
            assert isinstance(stage, FitOptions)
            length = min(stage.max_length, stage.max_tokens_per_microbatch)
            count = stage.batch_size * (2 if isinstance(stage, RewardModelStage) and stage.loss == "pairwise" else 1)
        mine = -(-count // self.ranks)
        together = max(1, min(mine, stage.max_tokens_per_microbatch // length))
        return length * together, -(-mine // together), count * length

    def _generate(self, stage: Any, model: _Model) -> dict[str, int]:
        config, size, rollout = model.config, self.dtype.itemsize, self.recipe.rollout
        found = {"gathered": size * model.numel}
        if rollout.engine != "r1fast":
            return found
        samples, prompts = _samples(stage)
        rows = min(rollout.max_num_seqs, -(-samples // self.ranks))
        prompts = min(rows, -(-prompts // self.ranks))
        shared, own = stage.max_prompt_length // 16, stage.max_prompt_length + stage.max_completion_length - 1
        blocks = rows * (num_blocks_of(own) - shared) + prompts * num_blocks_of(stage.max_prompt_length)
        found["cache"] = blocks * BlockCache.bytes_per_block(config, self.dtype)
        if rollout.kv_cache_memory_bytes is not None:
            found["cache"] = min(found["cache"], rollout.kv_cache_memory_bytes)
        # The step's, and those that samples of a prompt wait for.
        found["logits"] = (rows + prompts) * config.vocab_size * size
        length = min(stage.max_prompt_length, rollout.max_num_batched_tokens)
        together = max(1, min(prompts, rollout.max_num_batched_tokens // length))
        found["activations"] = self._inference(model, length * together)
        if self.device == "cuda" and not rollout.enforce_eager:
            found["graphs"] = self._inference(model, rows) + rows * config.vocab_size * size
        return found

    def _score(
        self, stage: GRPOStage, model: _Model, frozen: list[_Model], rest: dict[str, int], num_tokens: int
    ) -> dict[str, int]:
        found = dict(rest)
        found["gathered"] = self.dtype.itemsize * sum(
            x.gathered(self.ranks) for x in ([model] if stage.num_updates() > stage.max_steps else []) + frozen
        )
        if self._offloads("reference") and stage.has_reference:
            found["weights"] += self.dtype.itemsize * frozen[0].numel // self.ranks
        found["activations"] = self._inference(model, num_tokens)
        found["logits"] = min(head.WIDE_TILE_BYTES[self.device], num_tokens * model.config.vocab_size * 4)
        return found

    def _inference(self, model: _Model, num_tokens: int) -> int:
        states = 2 * num_tokens * model.config.hidden_size * self.dtype.itemsize
        return states + max(layer.inference for layer in self._layers(model, num_tokens))

    def _layers(self, model: _Model, num_tokens: int) -> list[Layer]:
        setting = self.recipe.trainer.activation_checkpointing
        layer = {
            i: layer_activations(model.config, i, num_tokens, self.dtype, self.device, setting)
            for i in set(model.kinds)
        }
        return [layer[i] for i in model.kinds]

    def _update(
        self, stage: TrainOptions, model: _Model, frozen: list[_Model], rest: dict[str, int],
        num_tokens: int, num_batches: int,
    ) -> dict[str, int]:  # fmt: skip
        """The worst of: the head, each layer's backward, the optimizer's step."""
        size, config = self.dtype.itemsize, model.config
        reduced = torch.float32.itemsize if self.recipe.trainer.reduce_dtype == "float32" else 2
        left = [] if self._offloads("reference") else frozen
        base = rest | {"gathered": size * sum(x.gathered(self.ranks) for x in (model, *left))}
        hidden = num_tokens * config.hidden_size * size
        layers = self._layers(model, num_tokens)
        kept = hidden + sum(layer.kept for layer in layers)
        shards = 4 * model.trained // self.ranks
        every = shards if num_batches > 1 else 0  # of the micro-batches before
        # Final norm, what of it is learned from, and its gradient; the head's own gradient, summed in fp32 over tiles.
        vocab = 1 if isinstance(stage, RewardModelStage) else config.vocab_size
        tile = min(head.TALL_TILE_BYTES[self.device], num_tokens * vocab * size)
        sums = vocab * config.hidden_size * (size if num_tokens * vocab * size <= tile else 4 + size)
        if model.adapters:  # the head has no gradient, and a unit but a small one
            sums = 0
        moments = [{"activations": kept + 3 * hidden, "logits": tile + sums, "gradients": every}]
        done = sums
        for i in reversed(range(len(layers))):
            now = {"activations": kept + layers[i].working, "logits": 0}
            if model.adapters:
                now["gradients"] = shards
            elif model.is_one_unit:
                done += size * model.layers[i]
                now["gradients"] = every + done
            else:
                done += 4 * model.layers[i] // self.ranks
                now["gradients"] = max(every, done) + (size + 2 * reduced) * model.layers[i]
            moments.append(now)
            kept -= layers[i].kept
        unit = model.largest_unit
        end = max(every, shards - 4 * unit // self.ranks) + (size + reduced) * unit + reduced * unit // self.ranks
        moments.append({"activations": hidden, "gradients": shards if model.adapters else end})
        step = {"gradients": shards} | self._step(stage, model)
        return max((base | moment for moment in [*moments, step]), key=lambda found: sum(found.values()))

    def _step(self, stage: TrainOptions, model: _Model) -> dict[str, int]:
        """Of the optimizer, what comes for a step, or is at work in Muon's."""
        found = {"optimizer": self._state(stage, model, offloads=False)}
        if self._offloads("optimizer"):
            largest = max(x.numel() for x in (*model.matrices, torch.Size([model.root])))
            found["optimizer"] = min(found["optimizer"], 8 * max(largest, PART_NUMEL) // self.ranks)
        if stage.optimizer == "muon":
            # Of the matrices that are whole at one time: updates and directions, gathered; of those of one shape X, its
            # successor and a product; three grams.
            for shape, number in model.matrices.items() if not model.adapters else ():
                short, long = sorted(shape[-2:])
                count = min(number * shape[:-2].numel(), max(shape.numel(), PART_NUMEL) // (short * long))
                needs = count * 4 * (short * long * 5 + 3 * short * short)
                found["activations"] = max(found.get("activations", 0), needs)
        return found


def _samples(stage: Any) -> tuple[int, int]:
    """The most samples that a stage asks for at a time, and their prompts; where data tell the number, very many."""
    many = 1 << 20
    found = [(0, 0)]
    if isinstance(stage, GRPOStage):
        found.append((stage.prompts_per_step * stage.num_generations, stage.prompts_per_step))
    if isinstance(stage, SampleOptions) and (not hasattr(stage, "teacher") or stage.teacher is not None):
        prompts = stage.num_prompts or many
        found.append((prompts * stage.most_samples(), prompts))
    if isinstance(stage, EvalOptions) and stage.eval_files:
        prompts = stage.eval_limit or many
        found.append((prompts * stage.eval_num_samples, prompts))
    return max(found)


def estimate(recipe: Recipe, stages: Sequence[str], num_ranks: int, ranks_here: int) -> list[Estimate]:
    """Of these stages, on the device that there is; ConfigError for the first that cannot fit on it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = free_memory(device)
    room = None if free is None else free // (1 if device.type == "cuda" else ranks_here)
    estimator = Estimator(recipe, num_ranks, device.type)
    found = [estimator.of_stage(stage) for stage in recipe.stages if stage.name in stages]
    known = [stage for stage in found if stage is not None]
    for stage in known:
        most = max(stage.phases, key=lambda phase: phase.total)
        if room is not None and most.total > room:
            term = max(most.bytes, key=lambda name: most.bytes[name])
            advice = ADVICE.get(term, "take more ranks, a smaller model or model.dtype: bfloat16")
            needed = f"{most.name} needs {_gib(most.total)} GiB on each of {num_ranks} ranks, {term} most of it"
            raise ConfigError(f"stages.{stage.stage}: {needed}; {device.type} has {_gib(room)} GiB free: {advice}")
    return known


def memory_table(found: Sequence[Estimate], num_ranks: int) -> Table:
    used = [term for term in TERMS if any(phase.bytes.get(term) for stage in found for phase in stage.phases)]
    title = f"GiB on each of {num_ranks} ranks, at the worst moment of a phase"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for heading in ("stage", "tokens/step", "phase", "total", *used):
        table.add_column(heading, justify="left" if heading in ("stage", "phase") else "right", no_wrap=True)
    for stage in found:
        for i, phase in enumerate(stage.phases):
            tokens = f"{stage.tokens_per_step:,}" if stage.tokens_per_step and not i else ""
            terms = (_gib(size) if (size := phase.bytes.get(term)) else "" for term in used)
            table.add_row("" if i else stage.stage, tokens, phase.name, _gib(phase.total), *terms)
    return table


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}"
