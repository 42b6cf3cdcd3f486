"""What a stage will take of one rank's memory, phase by phase, from recipe and architecture alone (`--dry-run`).

P parameters, R ranks, b and r bytes of model.dtype and reduce_dtype, U parameters of an FSDP unit.

weights      4 P / R of what is trained, b P / R of a frozen one: the shards (parallel/parallelize.py); with `lora` the
             adapters are the P that is trained, of gradients and optimizer too; b P of the copy that async_steps reads
gathered     b P on one rank, and wherever tokens are sampled; else b (root unit + three layers, one on its way)
gradients    4 P / R; of the unit at work b U and twice r U beside it (FSDP copies them to be reduced, and the result)
optimizer    8 P / R (AdamW) or 4 of a matrix (Muon); where it is offloaded, the part that a step has brought
activations  what layers keep for the backward pass, and the most that one has at work: one of each kind is run, forward
             and backward, on tensors without memory (activations.py)
logits       the tiles of head.py, with the head's gradient, which is made in the forward pass; of a decode step all
cache        keys and values, of full-length samples, or what is left for them: fewer run then (rollout/engine.py)
outputs, graphs   of generation, with its activations and logits by rollout/needs.py, as the engine counts them

Prompts and rows are as long as the files have them (lengths.py), completions as long as the recipe lets them be. Not
counted: the process itself with its libraries, the CUDA context (0.5 GB), what an allocator has free between tensors,
rewards, and a vLLM in the process, whose part of the device is gpu_memory_utilization.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table

from r1fast import host_memory
from r1fast.activations import Layer, layer_activations
from r1fast.config import ConfigError
from r1fast.lengths import Lengths
from r1fast.models.cache import BlockCache, free_memory
from r1fast.models.model_config import ModelConfig
from r1fast.parallel.optim import PART_NUMEL
from r1fast.parallel.parallelize import ONE_UNIT_NUMEL
from r1fast.preflight_models import (
    architecture_of,
    checkpoint_of,
    kinds_of_layers,
    layer_shapes,
    lora_config,
    with_adapters,
)
from r1fast.rollout.admission import num_blocks_of
from r1fast.rollout.needs import BACKGROUND_SHARE, RESERVE, Call, work_bytes
from r1fast.schema import CollectStage, DistillStage, GRPOStage, PretrainStage, Recipe, RewardModelStage
from r1fast.schema_options import (
    EvalOptions,
    FitOptions,
    GenerateOptions,
    LoraOptions,
    SampleOptions,
    StageBase,
    TrainOptions,
)
from r1fast.stages.packed import worthwhile
from r1fast_kernels import head
from r1fast_kernels.decode_attention import BLOCK

ADVICE = {
    "activations": "lower max_tokens_per_microbatch, or set trainer.activation_checkpointing",
    "logits": "lower rollout.max_num_seqs",
    "cache": "lower rollout.max_num_seqs, or set rollout.kv_cache_memory_bytes",
    "optimizer": "take more ranks, or set trainer.offload",
}
TERMS = ("weights", "gathered", "gradients", "optimizer", "activations", "logits", "cache", "outputs", "graphs")


@dataclass
class Sampling:
    """Of a phase in which the engine generates: what it takes, of which it does without `spare` of the cache; what is
    there before; and the share of the rest that it may take."""

    taken: int
    spare: int
    beside: int = 0
    share: float = 1.0


@dataclass
class Phase:
    """The moment of a phase that needs most: bytes by term."""

    name: str
    bytes: dict[str, int]
    sampling: Sampling | None = None

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def needed(self) -> int:
        """With what the engine leaves free."""
        if (s := self.sampling) is None:
            return self.total
        return max(self.total, s.beside + math.ceil(s.taken / (s.share * (1 - RESERVE))))

    def fit(self, room: int) -> None:
        """As the engine makes its cache."""
        if (s := self.sampling) is not None:
            less = min(s.spare, max(0, s.taken - int((room - s.beside) * s.share * (1 - RESERVE))))
            self.bytes["cache"] -= less
            s.spare -= less
            s.taken -= less


@dataclass
class Estimate:
    """Of one stage on one rank. tokens_per_step: that all ranks learn from, at most; 0: the stage does not train."""

    stage: str
    tokens_per_step: int = 0
    phases: list[Phase] = field(default_factory=list)


class _Model:
    """Sizes of a decoder, of which a layer of each kind is built on meta."""

    def __init__(self, config: ModelConfig, lora: LoraOptions | None = None, *, num_outputs: int | None = None) -> None:
        """num_outputs: 1 of a reward model, whose head is its own; None: the vocabulary."""
        self.config, self.num_outputs = config, num_outputs or config.vocab_size
        self.kinds, shapes = kinds_of_layers(config), layer_shapes(config)
        self.layers = [sum(x.numel() for x in layer) for layer in shapes]
        self.matrices = Counter(shape for layer in shapes for shape in layer if len(shape) > 1)
        self.root = (self.num_outputs + 1) * config.hidden_size  # norm and head; the embedding too where it is the head
        tied = config.tie_word_embeddings and num_outputs is None
        embed = 0 if tied else config.vocab_size * config.hidden_size
        self.numel = sum(self.layers) + self.root + embed
        self.lora = None if lora is None else lora_config(lora)
        adapted = () if lora is None else with_adapters(config, lora).parameters()
        self.adapters = sum(x.numel() for x in adapted if x.requires_grad)
        self.trained = self.numel if lora is None else self.adapters
        self.is_one_unit = self.numel <= ONE_UNIT_NUMEL
        self.ends = max(self.root, embed)  # of the units beside the layers
        self.largest_unit = self.numel if self.is_one_unit else max(*self.layers, self.ends)

    def gathered(self, num_ranks: int) -> int:
        """Parameters that a rank has whole while it trains."""
        whole = self.is_one_unit or num_ranks == 1
        return self.numel if whole else min(self.ends + 3 * max(self.layers), self.numel)


class _Batch(NamedTuple):
    """A full micro-batch: inputs, and tokens that only attention takes again. Of these a rank's in a step, and the
    tokens of a step in all."""

    num_tokens: int
    num_repeated: int
    number: int
    tokens_per_step: int


class Estimator:
    """Of a recipe on `num_ranks` ranks, each with a device of this type."""

    def __init__(self, recipe: Recipe, num_ranks: int, device: str, lengths: Lengths) -> None:
        self.recipe, self.ranks, self.device, self.lengths = recipe, num_ranks, device, lengths
        name = recipe.model.dtype if recipe.model.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
        self.dtype: torch.dtype = getattr(torch, name)

    def of_stage(self, stage: StageBase) -> Estimate | None:
        """None where the architecture is not known, which preflight has reported."""
        config = architecture_of(self.recipe, stage)
        if config is None:
            return None
        lora = stage.lora if isinstance(stage, TrainOptions) else None
        outputs = 1 if isinstance(stage, RewardModelStage) else None
        model, found = _Model(config, lora, num_outputs=outputs), Estimate(stage.name)
        if isinstance(stage, GenerateOptions):
            asked = self._asked(stage, of_teacher=True)
            for name, other in self._samplers(stage):
                needs, sampling = self._generate(stage, other, asked)
                shards = {"weights": self._shards(other)}
                there = shards["weights"] + needs["gathered"]
                found.phases.append(Phase(name, shards | needs, sampling and replace(sampling, beside=there)))
        frozen = list(self._frozen(stage))
        rest = self._resident(stage, model, frozen)
        # Frozen models are read after the optimizer is made. A rank of pretrain makes the model whole and keeps a part.
        whole = 4 * model.numel if isinstance(stage, PretrainStage) else rest["weights"]
        away = [x for x in frozen if x not in self._here(stage, frozen)]  # not yet
        load = rest | {"weights": rest["weights"] + sum(map(self._shards, away))} if frozen else {"weights": whole}
        found.phases.append(Phase("load", load))
        # On one rank the gathered weights of frozen models stay, once they ran.
        stays = {"gathered": self.dtype.itemsize * sum(x.gathered(self.ranks) for x in self._here(stage, frozen))}
        ahead: dict[str, int] = {}  # what samples meanwhile
        aside: Sampling | None = None
        asked = self._asked(stage)
        if isinstance(stage, GenerateOptions) and asked[0]:
            needs, sampling = self._generate(stage, model, asked)
            there = sum((rest | stays).values())
            if self._is_ahead(stage):  # in a thread, which has no gathered weights
                ahead = {name: size for name, size in needs.items() if name != "gathered"}
                aside = sampling and replace(sampling, beside=there)
            else:
                there += needs["gathered"]
            generate = Phase("generate", _sum(rest | needs, stays), sampling and replace(sampling, beside=there))
            found.phases.append(generate)
        if isinstance(stage, TrainOptions):
            batch = self._batch(stage)
            found.tokens_per_step = batch.tokens_per_step
            if isinstance(stage, GRPOStage) and (old_logprobs := self._forwards(stage)) is not None:
                score = self._score(stage, [model] * old_logprobs, frozen, rest, batch)
                found.phases.append(Phase("score", _sum(score, ahead), aside and replace(aside)))
            update = self._update(stage, model, frozen, rest, batch)
            found.phases.append(Phase("update", _sum(update, ahead), aside and replace(aside)))
            save = rest | stays | {"optimizer": self._state(stage, model, offloads=False)}
            found.phases.append(Phase("save", save))
        return found

    # ---- what stays ----

    def _frozen(self, stage: StageBase) -> Iterator[_Model]:
        """The models beside the one that is trained or sampled from."""
        if not isinstance(stage, GRPOStage):
            return
        refs = [(stage.ref_model, None)] if stage.has_reference else []
        for ref, num_outputs in [*refs, *((spec.model, 1) for spec in stage.reward_models.values())]:
            if (config := self._config_of(ref, stage)) is not None:
                yield _Model(config, num_outputs=num_outputs)

    def _samplers(self, stage: StageBase) -> Iterator[tuple[str, _Model]]:
        """Models that are sampled from while the stage's own is not there, and what they are to it."""
        ref = stage.teacher if isinstance(stage, DistillStage) else None
        if isinstance(stage, CollectStage) and stage.few_shot is not None:
            ref = stage.few_shot.model
        if ref is not None and (config := self._config_of(ref, stage)) is not None:
            yield "teacher" if isinstance(stage, DistillStage) else "few_shot", _Model(config)

    def _shards(self, model: _Model) -> int:
        """Of a frozen one."""
        return self.dtype.itemsize * model.numel // self.ranks

    def _is_ahead(self, stage: StageBase) -> bool:
        return isinstance(stage, GRPOStage) and self.recipe.rollout.async_steps > 0

    def _forwards(self, stage: GRPOStage) -> bool | None:
        """Whether the policy is run for log-probs before an update; None: nothing is."""
        many = stage.updates_per_step > 1 and stage.old_logprobs == "policy"
        policy = many or stage.loss.top_entropy_quantile < 1 or (stage.loss.beta > 0 and not stage.has_reference)
        return policy if policy or stage.has_reference or stage.reward_models else None

    def _config_of(self, ref: str | None, stage: StageBase) -> ModelConfig | None:
        if ref is None:
            return architecture_of(self.recipe, stage)
        return architecture_of(self.recipe, self.recipe.stage(ref[1:])) if ref[0] == "@" else checkpoint_of(ref)[0]

    def _offloads(self, name: str) -> bool:
        return name in self.recipe.trainer.offload

    def _here(self, stage: StageBase, frozen: list[_Model]) -> list[_Model]:
        """Without an offloaded reference, which comes first."""
        away = self._offloads("reference") and isinstance(stage, GRPOStage) and stage.has_reference
        return frozen[1:] if away else frozen

    def _resident(self, stage: StageBase, model: _Model, frozen: list[_Model]) -> dict[str, int]:
        is_whole = isinstance(stage, TrainOptions) and stage.lora is None
        size = (4 if is_whole else self.dtype.itemsize) * model.numel + 4 * model.adapters
        found = {"weights": size // self.ranks + sum(map(self._shards, self._here(stage, frozen)))}
        if self._is_ahead(stage):
            found["weights"] += self.dtype.itemsize * model.numel
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

    def _batch(self, stage: TrainOptions) -> _Batch:
        if isinstance(stage, FitOptions):
            num_tokens, number, tokens_per_step = self.lengths.batches(stage, self.ranks)
            return _Batch(num_tokens, 0, number, tokens_per_step)
        assert isinstance(stage, GRPOStage)
        prompt = self.lengths.prompt(stage, ["train_files"])
        length = prompt + stage.max_completion_length - 1
        count = stage.prompts_per_step * stage.num_generations // stage.steps_per_generation
        mine = -(-count // self.ranks)
        together = max(1, min(mine, stage.max_tokens_per_microbatch // length))
        prompts = -(-together * stage.steps_per_generation // stage.num_generations)
        repeated = worthwhile(max(0, together - prompts) * (prompt - 1), length * together)
        return _Batch(length * together - repeated, repeated, -(-mine // together), count * length)

    def _asked(self, stage: StageBase, *, of_teacher: bool = False) -> tuple[int, int]:
        """The most samples that are asked for at a time, and their prompts; very many, where data tell the number."""
        found = [(0, 0)]
        if isinstance(stage, GRPOStage):
            found.append((stage.prompts_per_step * stage.num_generations, stage.prompts_per_step))
        if isinstance(stage, SampleOptions) and (of_teacher or not isinstance(stage, DistillStage)):
            prompts = stage.num_prompts or self.lengths.num_rows(stage, "train_files")
            found.append((prompts * stage.most_samples(), prompts))
        if isinstance(stage, EvalOptions) and stage.eval_files and not of_teacher:
            prompts = stage.eval_limit or self.lengths.num_rows(stage, "eval_files")
            found.append((prompts * stage.eval_num_samples, prompts))
        return max(found)

    def _generate(
        self, stage: GenerateOptions, model: _Model, asked: tuple[int, int]
    ) -> tuple[dict[str, int], Sampling | None]:
        """By term, and what our engine takes, as it counts. ConfigError where it finds no room for one sample."""
        config, size, rollout = model.config, self.dtype.itemsize, self.recipe.rollout
        found = {"gathered": size * model.numel}
        if rollout.engine != "r1fast":
            return found, None
        rows, prompts = (min(rollout.max_num_seqs, -(-number // self.ranks)) for number in asked)
        length = self.lengths.prompt(stage)
        own = num_blocks_of(length + stage.max_completion_length - 1) - length // BLOCK
        has_graphs = self.device == "cuda" and not rollout.enforce_eager
        spare = int(has_graphs)  # the block of their padding
        block, budget = BlockCache.bytes_per_block(config, self.dtype), rollout.kv_cache_memory_bytes
        alone = (spare + num_blocks_of(length) + own) * block
        found["cache"] = (spare + rows * own + prompts * num_blocks_of(length)) * block
        if budget is not None and alone > budget:
            where = f"stages.{stage.name}: rollout.kv_cache_memory_bytes is {budget:,}"
            raise ConfigError(f"{where}; one completion takes {alone:,}: raise it, or lower max_completion_length")
        if budget is not None:
            found["cache"] = min(found["cache"], budget)
        call = Call(
            rows, prompts, prompts * length, rollout.max_num_batched_tokens, length + stage.max_completion_length,
            stage.max_completion_length, has_graphs, records=isinstance(stage, GRPOStage) and config.has_router,
        )  # fmt: skip
        beside_cache = work_bytes(config, self.dtype, self.device, call)
        taken = found["cache"] + sum(beside_cache.values())
        share = BACKGROUND_SHARE if self._is_ahead(stage) and budget is None else 1.0
        sparable = 0 if budget is not None else found["cache"] - alone
        return found | beside_cache, Sampling(taken, max(0, sparable), share=share)

    def _score(
        self, stage: GRPOStage, policy: list[_Model], frozen: list[_Model], rest: dict[str, int], batch: _Batch
    ) -> dict[str, int]:
        """policy: itself, where it is run too."""
        models = policy + frozen
        found = rest | {"gathered": self.dtype.itemsize * sum(x.gathered(self.ranks) for x in models)}
        if self._offloads("reference") and stage.has_reference:
            found["weights"] += self._shards(frozen[0])
        found["activations"] = max(self._inference(x, batch.num_tokens, batch.num_repeated) for x in models)
        outputs = max(x.num_outputs for x in models)
        found["logits"] = min(head.WIDE_TILE_BYTES[self.device], batch.num_tokens * outputs * 4)
        return found

    def _inference(self, model: _Model, num_tokens: int, num_repeated: int = 0) -> int:
        states = 2 * num_tokens * model.config.hidden_size * self.dtype.itemsize
        return states + max(layer.inference for layer in self._layers(model, num_tokens, num_repeated))

    def _layers(self, model: _Model, num_tokens: int, num_repeated: int) -> list[Layer]:
        setting = self.recipe.trainer.activation_checkpointing
        layer = {
            i: layer_activations(
                model.config, i, num_tokens, num_repeated, self.dtype, self.device, setting, model.lora
            )
            for i in set(model.kinds)
        }
        return [layer[i] for i in model.kinds]

    def _update(
        self, stage: TrainOptions, model: _Model, frozen: list[_Model], rest: dict[str, int], batch: _Batch
    ) -> dict[str, int]:
        """The worst of: the head, each layer's backward, the optimizer's step."""
        size, config, num_tokens = self.dtype.itemsize, model.config, batch.num_tokens
        reduced = torch.float32.itemsize if self.recipe.trainer.reduce_dtype == "float32" else 2
        here = [model, *self._here(stage, frozen)]
        base = rest | {"gathered": size * sum(x.gathered(self.ranks) for x in here)}
        hidden = num_tokens * config.hidden_size * size
        layers = self._layers(model, num_tokens, batch.num_repeated)
        kept = hidden + sum(layer.kept for layer in layers)
        shards = 4 * model.trained // self.ranks
        every = shards if batch.number > 1 else 0  # of the micro-batches before
        # Final norm, what of it is learned from, and its gradient; the head's own gradient, summed in fp32 over tiles.
        vocab = model.num_outputs
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


def _sum(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return {name: first.get(name, 0) + second.get(name, 0) for name in first | second}


def estimate(
    recipe: Recipe, stages: Sequence[str], num_ranks: int, ranks_here: int, lengths: Lengths
) -> list[Estimate]:
    """Of these stages, on the device that there is; ConfigError for the first that cannot fit on it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    room = free_memory(device) if device.type == "cuda" else host_memory.available(ranks_here)
    estimator = Estimator(recipe, num_ranks, device.type, lengths)
    found = [estimator.of_stage(stage) for stage in recipe.stages if stage.name in stages]
    known = [stage for stage in found if stage is not None]
    for stage in known:
        if room is not None:
            for phase in stage.phases:
                phase.fit(room)
        most = max(stage.phases, key=lambda phase: phase.needed)
        if room is not None and most.needed > room:
            term = max(most.bytes, key=lambda name: most.bytes[name])
            advice = ADVICE.get(term, "take more ranks, a smaller model or model.dtype: bfloat16")
            where = f"on each of {num_ranks} ranks, " if num_ranks > 1 else ""
            needed = f"{most.name} needs {_gib(most.needed)} GiB {where}{term} most of it"
            raise ConfigError(f"stages.{stage.stage}: {needed}; {device.type} has {_gib(room)} GiB free: {advice}")
    return known


def memory_table(found: Sequence[Estimate], num_ranks: int) -> Table:
    used = [term for term in TERMS if any(phase.bytes.get(term) for stage in found for phase in stage.phases)]
    title = f"GiB on {'the rank' if num_ranks == 1 else f'each of {num_ranks} ranks'}, at the worst moment of a phase"
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
    return f"{size / 2**30:.3g}" if size < 1000 << 30 else f"{size / 2**30:,.0f}"
