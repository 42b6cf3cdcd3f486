"""The optimizer step that every training stage shares, and forward passes over packed examples.

One step: micro-batches of packed tokens -> forward and backward -> clip -> optimizer -> router bias. A loss is divided
by the global count before backward and gradients are summed over ranks, so the step does not depend on how it is cut.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from r1fast.data.packing import balance, pack
from r1fast.models.decoder import Decoder
from r1fast.models.lora import set_noise
from r1fast.models.moe import Routing
from r1fast.parallel import checkpoint
from r1fast.parallel.optim import build_optimizer, lr_at
from r1fast.parallel.ordered import ordered_sums
from r1fast.parallel.parallelize import grad_norm_and_clip
from r1fast.schema_options import TrainOptions
from r1fast.stages.context import StageContext
from r1fast.stages.evaluate import Validation
from r1fast.stages.measures import Mean, Measures, merge, numbers
from r1fast.stages.packed import Example, PackedBatch, collate, empty_batch, num_repeated, of_step
from r1fast.stages.sampler import GenerationFailed
from r1fast.stages.scoring import NothingScored
from r1fast.stopping import Stopped

# (batch, hidden_TD, weight_VD) -> (loss already divided by the global count, this batch's part of the metrics)
LossFn = Callable[[PackedBatch, Tensor, Tensor], tuple[Tensor, Measures]]
Unit = Sequence[Example]  # of a row


class Trainer:
    """A sharded model, its optimizer and schedule, and the count of steps taken."""

    def __init__(
        self, ctx: StageContext[TrainOptions], model: Decoder, total_steps: int, *,
        validation: Validation | None = None, router_replay: bool = False,
    ) -> None:  # fmt: skip
        options = ctx.stage
        self.ctx, self.model, self.total_steps, self.router_replay = ctx, model, total_steps, router_replay
        self.validation = validation
        self.optimizer = build_optimizer(
            model, name=options.optimizer, learning_rate=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2), eps=1e-8, weight_decay=options.weight_decay,
            offload="optimizer" in ctx.recipe.trainer.offload,
        )  # fmt: skip
        self.step = 0
        self.saved: nn.Module = model  # what checkpoints hold; GRPO adds its reference
        # What a checkpoint holds is on the device inside these, if it was away.
        self.offloaded: list[Callable[[], AbstractContextManager[None]]] = [self.optimizer.here]
        self.state_at: Callable[[int], dict[str, Any]] = lambda step: {}  # what they hold beside it
        self.saved_step = 0  # of the newest checkpoint

    def fit(self, units: Sequence[Unit], batch_size: int, loss_of: Callable[[Sequence[Unit]], LossFn]) -> None:
        """All steps, of batch_size units each, in an order that depends on the seed and the epoch only.

        units: of as many examples each, which stay together. loss_of: the loss of a step's units.
        """
        self.restore()
        with self.ctx.log(self.total_steps, self.step) as log:
            while self.goes_on(self.step, self.total_steps):
                start = time.perf_counter()
                chosen = [units[i] for i in of_step(self.step, len(units), batch_size, self.ctx.seed)]
                examples = [example for unit in chosen for example in unit]
                try:
                    with self.ctx.phase("update"):
                        metrics = numbers(self.update(examples, loss_of(chosen), group_size=len(chosen[0])))
                except FloatingPointError:
                    self.save_good(self.step)
                    raise
                num_tokens, seconds = sum(example.num_inputs for example in examples), time.perf_counter() - start
                log.log(self.step, metrics | {"num_tokens": num_tokens, "tokens_per_second": num_tokens / seconds})
                self.save(self.step, last=self.step == self.total_steps)
            self.take_best(self.step)

    def goes_on(self, progress_step: int, last: int) -> bool:
        """Whether the stage takes another step; evaluates before it says so, where that is due."""
        if self.validation is None:
            return progress_step < last
        try:
            return self.validation.has_patience(progress_step) and progress_step < last
        except (GenerationFailed, NothingScored, Stopped):  # not where the weights are at fault
            self.save_good(progress_step)
            raise

    def take_best(self, progress_step: int) -> None:
        """After the last step: the weights of the best one, where the recipe says so."""
        best = None if self.validation is None else self.validation.keeps()
        if progress_step > self.saved_step:  # it was stopped early
            self._save(progress_step)
        if best is not None:
            self.ctx.entry["best_step"] = best
        if best is not None and best != progress_step:
            self.ctx.message(f"{self.ctx.stage.name}: step {best} of {progress_step} was the best")
            self._load(self.ctx.stage_dir / "checkpoints" / f"step_{best}")

    def update(self, examples: Sequence[Example], loss_fn: LossFn, *, group_size: int = 1) -> Measures:
        """One optimizer step on this step's examples, which every rank holds; each rank works on its share.

        group_size: runs of that many examples stay in one micro-batch, in order (2 for preference pairs).
        Without examples the gradient is 0, and what the optimizer does beside it is done: momentum, weight decay.
        Raises FloatingPointError before the weights change when the loss or the gradient is not finite.
        """
        self.model.train()
        batches = self._my_batches([examples[i : i + group_size] for i in range(0, len(examples), group_size)])
        coefficient, device = self.ctx.stage.router_aux_loss_coef, self.ctx.dist.device
        # The balance loss is a mean over the sequences of the step, as every loss is, and a sum over layers.
        scale = torch.tensor(coefficient / max(len(examples), 1), device=device) if coefficient > 0 else None
        shape = sum(1 for _ in self.model.moe_layers()), self.model.config.n_routed_experts
        counts_LE = torch.zeros(shape, dtype=torch.int64, device=device)
        parts: list[Measures] = []
        for i, batch in enumerate(batches):
            if self.ctx.stage.lora is not None:
                set_noise(self.model, crc32(f"{self.ctx.seed},{self.step},{self.ctx.dist.rank},{i}".encode()))
            with ordered_sums(device, self.ctx.recipe.trainer.deterministic):
                loss, found, routing = self._forward(batch, loss_fn, scale)
                loss.backward()
            parts.append({"loss": Mean(loss.detach(), 0), **found})
            if batch is not None and routing is not None:
                counts_LE += count_experts(routing.expert_ids, counts_LE.shape[1])
                parts.append(self._routing_measures(batch, routing))
        grad_norm = float(grad_norm_and_clip(self.model.parameters(), self.ctx.stage.max_grad_norm))
        totals = merge(self.ctx.dist.all_gather_objects(merge(parts)))
        loss_sum = totals["loss"].total  # type: ignore[union-attr]
        if not (math.isfinite(grad_norm) and math.isfinite(loss_sum)):
            what = f"stage {self.ctx.stage.name}, step {self.step + 1}: loss {loss_sum}, gradient norm {grad_norm}"
            advice = "the weights were not changed. Lower the learning rate or look at the batch"
            raise FloatingPointError(f"{what}; {advice}")
        # Of an update that learned from nothing there is neither.
        learned = float(any(example.num_learned for example in examples))
        totals |= {"loss": Mean(loss_sum, learned), "grad_norm": Mean(grad_norm * learned, learned)}
        totals["learning_rate"] = Mean(self._set_lr(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return totals | self._end_balance(counts_LE)

    def restore(self) -> dict[str, Any]:
        """Load the newest complete checkpoint of the stage, if any; returns what was saved beside the model."""
        ctx, folder = self.ctx, self.ctx.stage_dir / "checkpoints"
        path = checkpoint.latest(folder, ctx.dist)
        progress_step = 0 if path is None else int(path.name.removeprefix("step_"))
        if self.validation is not None:
            self.validation.begin(progress_step)
        if ctx.dist.is_main:
            checkpoint.tidy(folder, path, *self._retained())
        if path is None:
            return {}
        extra = self._load(path)
        self.step, self.saved_step = extra["step"], progress_step
        if self.step > self.total_steps:
            advice = "they can become more, or as many as were taken"
            raise ctx.error(
                f"{path} has taken {self.step} optimizer steps, and the recipe has {self.total_steps}: {advice}"
            )
        ctx.resume_clock(extra["clock"])
        return extra

    def _load(self, path: Path) -> dict[str, Any]:
        try:
            with self._here():
                return checkpoint.load(path, model=self.saved, optimizer=self.optimizer, dist=self.ctx.dist)
        except ValueError as error:
            raise self.ctx.error(f"{error}; put back what was changed, or start a new run") from error

    @contextmanager
    def _here(self) -> Iterator[None]:
        with ExitStack() as held:
            for here in self.offloaded:
                held.enter_context(here())
            yield

    def _retained(self) -> tuple[int, int | None]:
        """How many checkpoints are kept, and which beside them."""
        return self.ctx.stage.save_total_limit, None if self.validation is None else self.validation.keeps()

    def save(self, progress_step: int, *, last: bool) -> None:
        """Save a checkpoint where one is due; raises Stopped after it where the ranks have agreed to stop."""
        may_be_best = self.validation is not None and self.validation.may_be_best(progress_step)
        if last or may_be_best or self.ctx.stop.agreed or progress_step % self.ctx.stage.save_steps == 0:
            self._save(progress_step)
            self.ctx.stop.end()

    def save_good(self, progress_step: int) -> None:
        """Before the stage ends by an error, with weights as that step left them: keep it, unless it is saved."""
        if progress_step > self.saved_step:
            self._save(progress_step)

    def _save(self, progress_step: int) -> None:
        ctx, state = self.ctx, self.state_at(progress_step)

        def sync_log() -> None:  # a step that is saved is logged
            if ctx.stop.problem is not None:
                raise ctx.stop.problem
            if ctx.stage_log is not None:
                ctx.stage_log.sync()

        with ctx.phase("save"), self._here():
            ctx.dist.on_main(sync_log)
            folder, extra = ctx.stage_dir / "checkpoints", {"step": self.step, "clock": ctx.clock(), **state}
            keep, best = self._retained()
            checkpoint.save(
                folder, progress_step, model=self.saved, optimizer=self.optimizer, extra=extra, dist=ctx.dist,
                keep=keep, best=best,
            )  # fmt: skip
        self.saved_step = progress_step

    def _my_batches(self, units: list[Sequence[Example]]) -> list[PackedBatch | None]:
        """Of each rank as many, at least one. None: no work is left, but the rank takes part in every collective."""
        dist = self.ctx.dist
        groups = share(units, self.ctx)
        batches = [collate([example for i in group for example in units[i]], dist.device) for group in groups]
        most = self.ctx.stop.share(dist, max(len(batches), 1))
        return [*batches, *[None] * (most - len(batches))]

    def _forward(
        self, batch: PackedBatch | None, loss_fn: LossFn, balance_scale: Tensor | None
    ) -> tuple[Tensor, Measures, Routing | None]:
        if batch is None:
            batch, balance_scale = empty_batch(self.ctx.dist.device), None
        head = partial(loss_fn if batch.target_ids_M.numel() else _no_loss, batch)
        replayed = batch.routed_TLK if self.router_replay else None
        (loss, found), routing = self.model(
            batch.input_ids_T, batch.cu_seqlens, head=head, replay_ids_TLK=replayed, balance_scale=balance_scale,
            with_routing=True, shared_S=batch.shared_S,
        )  # fmt: skip
        return loss, found, routing

    def _routing_measures(self, batch: PackedBatch, routing: Routing) -> Measures:
        found: Measures = {}
        if routing.balance is not None:
            balance = self.ctx.stage.router_aux_loss_coef * routing.balance.double()
            found["moe/aux_loss"] = Mean(balance, len(batch.cu_seqlens) - 1)
        if batch.routed_TLK is not None and not self.router_replay:
            changed_TL = changed_routings(routing.expert_ids, batch.routed_TLK)
            found["moe/changed_routings"] = Mean(changed_TL.sum(), changed_TL.numel())
        return found

    def _set_lr(self) -> float:
        """Of the next optimizer step; returns it."""
        schedule = {"warmup_steps", "lr_scheduler_type", "min_lr_ratio", "decay_ratio"}
        scale = lr_at(self.step, max_steps=self.total_steps, **self.ctx.stage.model_dump(include=schedule))
        self.optimizer.set_lr(scale)
        return scale * self.ctx.stage.learning_rate

    @torch.no_grad()
    def _end_balance(self, counts_LE: Tensor) -> Measures:
        """Load metrics, and V3's balance rule (2412.19437, section 2.1.2): b += rate * sign(mean load - load).

        Both from global counts. moe/load [L][E] is relative to an even load of 1.
        """
        if not counts_LE.numel():
            return {}
        counts_LE = self.ctx.dist.all_reduce_sum(counts_LE.float())
        rate = self.ctx.stage.router_bias_update_rate
        if rate > 0:
            for layer, counts_E in zip(self.model.moe_layers(), counts_LE, strict=True):
                bias_E = layer.gate.e_score_correction_bias
                assert bias_E is not None, "preflight refuses a rate for a router without a bias"
                bias_E += rate * torch.sign(counts_E.mean() - counts_E)
        even = float(counts_LE[0].mean())  # as in every layer
        if not even:
            return {}
        violation = counts_LE.amax(1).mean() / even - 1
        return merge([{"moe/max_violation": Mean(violation, 1.0), "moe/load": Mean(counts_LE, even)}])


def changed_routings(expert_ids_TLK: Tensor, recorded_TLK: Tensor) -> Tensor:
    """Which (token, layer) pairs go to another set of experts than the sampler's did, [T, L]."""
    return (expert_ids_TLK.sort(-1).values != recorded_TLK.sort(-1).values).any(-1)


def count_experts(expert_ids_TLK: Tensor, num_experts: int) -> Tensor:
    """How many tokens chose each expert of each layer, int64 [L, E]."""
    chosen_LM = expert_ids_TLK.transpose(0, 1).flatten(1)
    counts_LE = chosen_LM.new_zeros(len(chosen_LM), num_experts)
    return counts_LE.scatter_add_(1, chosen_LM, torch.ones_like(chosen_LM))  # of integers: any order


def share(units: Sequence[Sequence[Example]], ctx: StageContext[TrainOptions]) -> list[list[int]]:
    """This rank's part of the units, as micro-batches of indices. Examples of a prompt come together."""
    most, num_ranks = ctx.stage.max_tokens_per_microbatch, ctx.dist.world_size
    lengths = [sum(example.num_inputs for example in unit) for unit in units]
    bundles = _bundles(units, lengths, most if num_ranks == 1 else min(most, sum(lengths) // (2 * num_ranks)))
    costs = [sum(lengths[i] for i in b) - num_repeated([x for i in b for x in units[i]]) for b in bundles]
    mine = balance(costs, num_ranks)[ctx.dist.rank]
    groups = pack([sum(lengths[i] for i in bundles[b]) for b in mine], most)
    return [[i for b in group for i in bundles[mine[b]]] for group in groups]


def _bundles(units: Sequence[Sequence[Example]], lengths: Sequence[int], most: int) -> list[list[int]]:
    """Units that the model is given together, of at most so many tokens: those of one prompt, if that saves work."""
    if any(len(unit) > 1 for unit in units) or not num_repeated([example for (example,) in units]):
        return [[i] for i in range(len(units))]
    bundles = list[list[int]]()
    last, room = dict[Any, list[int]](), dict[Any, int]()  # of each prompt, and the room that it has
    for i, (example,) in enumerate(units):
        prompt = example.prompt()
        if prompt not in last or room[prompt] < lengths[i]:
            last[prompt], room[prompt] = [], most
            bundles.append(last[prompt])
        last[prompt].append(i)
        room[prompt] -= lengths[i]
    return bundles


def _no_loss(batch: PackedBatch, hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Measures]:
    return hidden_TD.sum() * 0 + weight_VD.sum() * 0, {}


@torch.no_grad()
def map_packed(
    ctx: StageContext[TrainOptions],
    model: Decoder,
    examples: Sequence[Example],
    head: Callable[[PackedBatch, Tensor, Tensor], Tensor],
    *,
    per_token: bool,
    router_replay: bool = False,
) -> list[Any]:
    """Forward only: head's values for each example, on every rank, in order: a list per example, or one number.

    head returns a value per learned token, or per sequence where per_token is False. The list of an example that is not
    learned is empty. router_replay: with the experts that the sampler took.
    """
    dist = ctx.dist
    model.eval()
    groups = share([[example] for example in examples], ctx)
    most = int(dist.all_reduce_max(torch.tensor(len(groups))))
    results: dict[int, Any] = {}
    for group in [*groups, *[[]] * (most - len(groups))]:
        batch = collate([examples[i] for i in group], dist.device) if group else empty_batch(dist.device)
        replayed = batch.routed_TLK if router_replay else None
        found = model(
            batch.input_ids_T, batch.cu_seqlens, head=partial(head, batch), replay_ids_TLK=replayed,
            shared_S=batch.shared_S,
        )  # fmt: skip
        left = iter(found.float().tolist())
        for i in group:
            results[i] = list(islice(left, examples[i].num_learned)) if per_token else next(left)
    merged = {i: value for part in dist.all_gather_objects(results) for i, value in part.items()}
    return [merged[i] for i in range(len(examples))]
