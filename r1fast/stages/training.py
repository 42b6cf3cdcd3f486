"""The optimizer step that every training stage shares, and forward passes over packed examples.

One step: micro-batches of packed tokens -> forward and backward -> clip -> optimizer -> router bias. A loss is divided
by the global count before backward and gradients are summed over ranks, so the step does not depend on how it is cut.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r1fast.config import ConfigError
from r1fast.data.packing import balance, pack
from r1fast.dist import checkpoint
from r1fast.dist.optim import build_optimizer, lr_at
from r1fast.dist.parallelize import grad_norm_and_clip
from r1fast.models.decoder import Decoder
from r1fast.stages.batch import Batch, Example, collate, empty_batch
from r1fast.stages.context import StageContext

# (batch, hidden_TD, weight_VD) -> (loss already divided by the global count, metrics). Metrics are means over
# the learned tokens, or over metrics["weight"] items.
LossFn = Callable[[Batch, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


class Trainer:
    """A sharded model, its optimizer and schedule, and the count of steps taken."""

    def __init__(self, ctx: StageContext, model: Decoder, total_steps: int, *, router_replay: bool = False) -> None:
        options = ctx.stage
        check_router_options(options, model, router_replay)
        self.router_replay = router_replay
        self.ctx, self.model, self.total_steps = ctx, model, total_steps
        self.optimizer = build_optimizer(
            model,
            name=options.optimizer,
            learning_rate=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=1e-8,
            weight_decay=options.weight_decay,
        )
        self.step = 0
        self.saved: nn.Module = model  # what checkpoints hold; GRPO adds its reference
        self.saved_step = 0  # of the newest checkpoint

    def update(self, examples: Sequence[Example], loss_fn: LossFn, *, together: int = 1) -> dict[str, float]:
        """One optimizer step on this step's examples, which every rank holds; each rank works on its share.

        together: runs of that many examples stay in one micro-batch, in order (2 for preference pairs).
        Raises FloatingPointError before the weights change when the loss or the gradient is not finite.
        """
        self.model.train()
        batches = self._my_batches([examples[i : i + together] for i in range(0, len(examples), together)])
        self._begin_balance(len(examples))
        totals: dict[str, Tensor] = {}
        for batch in batches:
            loss, found = self._forward(batch, loss_fn)
            loss.backward()
            weight = float(found.pop("weight", batch.target_ids_M.numel()))
            _accumulate(totals, {"loss": loss.detach(), **found}, weight)
        grad_norm = grad_norm_and_clip(self.model.parameters(), self.ctx.stage.max_grad_norm)
        metrics = self._reduce(totals) | {"grad_norm": float(grad_norm), "learning_rate": self._set_lr()}
        if not (math.isfinite(metrics["grad_norm"]) and math.isfinite(metrics["loss"])):
            raise FloatingPointError(
                f"stage {self.ctx.stage.name}, step {self.step + 1}: loss {metrics['loss']}, gradient norm "
                f"{metrics['grad_norm']}; the weights were not changed. Lower the learning rate or look at the batch"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return metrics | self._end_balance()

    def restore(self) -> dict[str, Any]:
        """Load the newest complete checkpoint of the stage, if any; returns what was saved beside the model."""
        ctx = self.ctx
        if ctx.dist.is_main:
            checkpoint.tidy(ctx.checkpoints)
        ctx.dist.barrier()
        path = checkpoint.latest(ctx.checkpoints, ctx.dist)
        if path is None:
            return {}
        try:
            extra, _ = checkpoint.load(path, model=self.saved, optimizer=self.optimizer, dist=ctx.dist)
        except ValueError as error:
            raise ConfigError(
                f"stages.{ctx.stage.name}: {error}; put back what was changed, or start a new run"
            ) from error
        self.step, self.saved_step = extra["step"], int(path.name.removeprefix("step_"))
        if self.step > self.total_steps:
            raise ConfigError(
                f"stages.{ctx.stage.name}: {path} has taken {self.step} optimizer steps, and the recipe has "
                f"{self.total_steps}: they can become more, or as many as were taken"
            )
        ctx.take_up_clock(extra["clock"])
        return extra

    def is_due(self, progress_step: int, *, last: bool) -> bool:
        """Whether a checkpoint is; also when the ranks have agreed to stop."""
        return last or bool(self.ctx.stop.agreed) or progress_step % self.ctx.stage.save_steps == 0

    def save(self, progress_step: int, *, last: bool, **extra: Any) -> Path | None:
        """Save a checkpoint where one is due; raises Stopped after it where the ranks have agreed to stop."""
        if not self.is_due(progress_step, last=last):
            return None
        path = self._save(progress_step, extra)
        self.ctx.stop.end()
        return path

    def save_good(self, progress_step: int, **extra: Any) -> None:
        """Before the stage ends by an error, with weights as that step left them: keep it, unless it is saved."""
        if progress_step > self.saved_step:
            self._save(progress_step, extra)

    def _save(self, progress_step: int, extra: dict[str, Any]) -> Path:
        ctx = self.ctx
        with ctx.phase("save"):
            ctx.dist.on_main(self._sync_log)  # a step that is saved is logged
            path = checkpoint.save(
                ctx.checkpoints,
                progress_step,
                model=self.saved,
                optimizer=self.optimizer,
                extra={"step": self.step, "clock": ctx.clock(), **extra},
                rank_state={},
                dist=ctx.dist,
            )
        self.saved_step = progress_step
        return path

    def _sync_log(self) -> None:
        if self.ctx.stop.problem is not None:
            raise self.ctx.stop.problem
        if self.ctx.stage_log is not None:
            self.ctx.stage_log.sync()

    def _my_batches(self, units: list[Sequence[Example]]) -> list[Batch]:
        dist = self.ctx.dist
        groups = share(units, self.ctx)
        batches = [collate([example for i in group for example in units[i]], dist.device) for group in groups]
        most = self.ctx.stop.share(dist, len(batches))
        return batches + [empty_batch(dist.device)] * (most - len(batches))

    def _forward(self, batch: Batch, loss_fn: LossFn) -> tuple[Tensor, dict[str, Tensor]]:
        if not batch.loss_index_M.numel():
            self.model.eval()  # the filler token does not count towards any expert's load
            loss, metrics = self.model(batch.input_ids_T, batch.cu_seqlens, head=partial(_no_loss, batch))
            self.model.train()
            return loss, metrics
        replayed = batch.routed_TLK if self.router_replay else None
        loss, metrics = self.model(
            batch.input_ids_T, batch.cu_seqlens, head=partial(loss_fn, batch), replay_ids_TLK=replayed
        )
        if batch.routed_TLK is not None and not self.router_replay:
            metrics["moe/changed_routings"] = changed_routings(self.model.last_expert_ids(), batch.routed_TLK)
        return loss, metrics

    def _set_lr(self) -> float:
        options = self.ctx.stage
        scale = lr_at(
            self.step,
            max_steps=self.total_steps,
            warmup_steps=options.warmup_steps,
            lr_scheduler_type=options.lr_scheduler_type,
            min_lr_ratio=options.min_lr_ratio,
            decay_ratio=options.decay_ratio,
        )
        self.optimizer.set_lr(scale)
        return scale * options.learning_rate

    def _reduce(self, totals: dict[str, Tensor]) -> dict[str, float]:
        """Metrics over micro-batches and ranks: loss a sum, */max a maximum, the rest weighted means."""
        gathered = self.ctx.dist.all_gather_objects({name: value.tolist() for name, value in totals.items()})
        names = dict.fromkeys(name for part in gathered for name in part)
        out: dict[str, float] = {}
        for name in names:
            parts = [part[name] for part in gathered if name in part]
            if name == "loss":
                out[name] = sum(value for value, _ in parts)
            elif name.endswith("/max"):
                out[name] = max(value for value, _ in parts)
            else:
                out[name] = sum(value for value, _ in parts) / max(sum(weight for _, weight in parts), 1.0)
        return out

    def _begin_balance(self, num_sequences: int) -> None:
        """The balance loss is a mean over the sequences of the step, as every loss is, and a sum over layers."""
        coefficient = self.ctx.stage.router_aux_loss_coef
        for layer in self.model.moe_layers():
            scale = torch.tensor(coefficient / num_sequences, device=self.ctx.dist.device)
            layer.balance_scale = scale if coefficient > 0 else None
            layer.last_balance = torch.zeros_like(layer.last_balance)

    @torch.no_grad()
    def _end_balance(self) -> dict[str, Any]:
        """Load metrics, and V3's balance rule (2412.19437, section 2.1.2): b += rate * sign(mean load - load).

        Both from global counts. moe/load [L][E] is relative to an even load of 1.
        """
        layers = list(self.model.moe_layers())
        if not layers:
            return {}
        counts_LE = self.ctx.dist.all_reduce_sum(torch.stack([layer.last_counts for layer in layers]).float())
        rate = self.ctx.stage.router_bias_update_rate
        for layer, counts_E in zip(layers, counts_LE, strict=True):
            if rate > 0:
                layer.gate.e_score_correction_bias += rate * torch.sign(counts_E.mean() - counts_E)
            layer.last_counts = torch.zeros_like(layer.last_counts)
        load_LE = counts_LE / counts_LE.mean(1, keepdim=True)
        metrics: dict[str, Any] = {
            "moe/max_violation": float(load_LE.amax(1).mean() - 1), "moe/load": load_LE.tolist()
        }  # fmt: skip
        if (scale := layers[0].balance_scale) is not None:
            scaled = scale * torch.stack([layer.last_balance for layer in layers]).sum()
            metrics["moe/aux_loss"] = float(self.ctx.dist.all_reduce_sum(scaled))
        return metrics


def check_router_options(options: Any, model: Decoder, router_replay: bool) -> None:
    layers = list(model.moe_layers())
    for name, value in (
        ("router_bias_update_rate", options.router_bias_update_rate),
        ("router_aux_loss_coef", options.router_aux_loss_coef),
        ("router_replay", router_replay),
    ):
        if value and not layers:
            raise ConfigError(
                f"stages.{options.name}.{name} = {value}: {model.config.model_type} has no router; drop it"
            )
    if options.router_bias_update_rate > 0 and any(layer.gate.e_score_correction_bias is None for layer in layers):
        raise ConfigError(
            f"stages.{options.name}.router_bias_update_rate = {options.router_bias_update_rate}: the router of "
            f"{model.config.model_type} has no bias; leave it at 0"
        )


def changed_routings(expert_ids_TLK: Tensor, recorded_TLK: Tensor) -> Tensor:
    """Share of (token, layer) pairs that go to another set of experts than the sampler's did."""
    changed_TL = (expert_ids_TLK.sort(-1).values != recorded_TLK.sort(-1).values).any(-1)
    return changed_TL.float().mean()


def share(units: Sequence[Sequence[Example]], ctx: StageContext) -> list[list[int]]:
    """This rank's part of the units, as micro-batches of indices."""
    lengths = [sum(example.num_inputs for example in unit) for unit in units]
    mine = balance(lengths, ctx.dist.world_size)[ctx.dist.rank]
    groups = pack([lengths[i] for i in mine], ctx.stage.max_tokens_per_microbatch)
    return [[mine[i] for i in group] for group in groups]


def _no_loss(batch: Batch, hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return hidden_TD.sum() * 0 + weight_VD.sum() * 0, {}


def _accumulate(totals: dict[str, Tensor], metrics: dict[str, Tensor], num_items: float) -> None:
    """totals[name] = [sum of value * weight, sum of weights], or the plain sum for the loss, or the maximum."""
    for name, value in metrics.items():
        value = value.detach().double().cpu()
        weight = 1.0 if name == "loss" else num_items
        new = torch.stack(
            [value if name.endswith("/max") else value * weight, torch.tensor(weight, dtype=torch.float64)]
        )
        old = totals.get(name)
        if old is None:
            totals[name] = new
        else:
            totals[name] = torch.maximum(old, new) if name.endswith("/max") else old + new


@torch.no_grad()
def map_packed(
    ctx: StageContext,
    model: Decoder,
    examples: Sequence[Example],
    head: Callable[[Batch, Tensor, Tensor], Tensor],
    *,
    per_token: bool,
    router_replay: bool = False,
) -> list[Any]:
    """Forward only: head's values for each example, on every rank, in order: a list per example, or one number.

    head returns a value per learned token, or per sequence where per_token is False. router_replay: with the experts
    that the sampler took.
    """
    dist = ctx.dist
    model.eval()
    groups = share([[example] for example in examples], ctx)
    most = int(dist.all_reduce_max(torch.tensor(len(groups))))
    results: dict[int, Any] = {}
    for turn in range(most):
        group = groups[turn] if turn < len(groups) else []
        batch = collate([examples[i] for i in group], dist.device) if group else empty_batch(dist.device)
        replayed = batch.routed_TLK if router_replay else None
        values = model(batch.input_ids_T, batch.cu_seqlens, head=partial(head, batch), replay_ids_TLK=replayed)
        values = values.float().tolist()
        ends = batch.loss_cu_seqlens.tolist()
        for place, i in enumerate(group):
            results[i] = values[ends[place] : ends[place + 1]] if per_token else values[place]
    merged = {i: value for part in dist.all_gather_objects(results) for i, value in part.items()}
    return [merged[i] for i in range(len(examples))]
