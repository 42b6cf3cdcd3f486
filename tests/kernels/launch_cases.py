"""Calls of every public op over the options that make another kernel, as `(options, call)`; see fake_gpu.py.

Shapes are production's where tile sizes depend on them, and 1 where Triton makes a constant of it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

import r1fast_kernels as kernels
from r1fast_kernels import decode_parts as parts
from tests.kernels.backends import BF16, FP16, FP32

Options = dict[str, Any]
INT32, INT64 = torch.int32, torch.int64
FLOATS = (BF16, FP16, FP32)


def new(*shape: int, dtype: torch.dtype = FP32, learns: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=learns)


def backward(*outputs: Any) -> None:
    """Of the sum of everything that has a gradient."""
    total = sum(x.sum() for x in outputs if x.requires_grad)
    if isinstance(total, torch.Tensor):
        total.backward()


@dataclass(frozen=True)
class Case:
    """call(**one of the options' values each)."""

    options: dict[str, tuple[Any, ...]]
    call: Callable[..., None]
    valid: Callable[[Options], bool] = lambda _: True
    odd: Callable[[Options], bool] = lambda options: any(size % 16 for size in options.get("widths", ()))


def _selective(dtype: torch.dtype, entropy: bool, inplace: bool, vocab: int, whole: bool) -> None:
    """whole: the logits, else some columns of wider ones, as a view."""
    logits = new(3, vocab, dtype=dtype, learns=True)
    rows = logits if whole else torch.empty(3, vocab + 7, dtype=dtype)[:, :vocab].requires_grad_()
    backward(*_as_tuple(kernels.selective_logprobs(
        rows, new(3, dtype=INT64), with_entropy=entropy, inplace_backward=inplace
    )))  # fmt: skip


def _as_tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


def _head(op: str, dtype: torch.dtype, num_tokens: int, vocab: int, entropy: bool) -> None:
    """Tiles of logits: whole, wide ones (many tokens), tall ones."""
    head = new(num_tokens, 64, dtype=dtype, learns=True), new(vocab, 64, dtype=dtype, learns=True)
    ids = new(num_tokens, dtype=INT64)
    if op == "logprobs":
        backward(*_as_tuple(kernels.linear_logprobs(*head, ids, with_entropy=entropy)))
    elif op == "cross_entropy":
        backward(kernels.linear_cross_entropy(*head, ids, ignore_index=None))
    else:
        backward(kernels.linear_grpo_loss(*head, ids, new(3, dtype=INT32), advantages_N=new(2))[0])


def _advantages(dtype: torch.dtype, scale: str, num_samples: int) -> None:
    kernels.group_advantages(new(num_samples, dtype=dtype), new(num_samples, dtype=INT64), scale=scale)


GRPO_OPTIONS: dict[str, tuple[Any, ...]] = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"),
    "importance_level": ("token", "sequence"),
    "scale_rewards": (None, "group", "batch", "none"),  # None: advantages are given
    "old": (True, False),
    "ref": (None, 0.0, 0.1),  # beta; None: no reference
    "kl": ("k1", "k2", "k3", "k3_unbiased"),
    "sampler": (None, "metrics", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "least": (None, 0.5),
    "off_policy": (None, 0.1),
    "delta": (None, 4.0),
    "mask": (False, True),
    "counts": (False, True),
    "total": (None, 7.0, FP32, INT64),
    "entropy": (None, 0.0, 0.01),  # its factor; None: not given
    "top_entropy": (None, FP32, "of the call"),
    "num_samples": (1, 5),
    "dtype": FLOATS,
    "offsets": (INT32, INT64),
}


def _grpo_is_valid(options: Options) -> bool:
    if options["loss_type"] == "cispo" and options["delta"] is not None:
        return False
    if options["least"] is not None and options["sampler"] in (None, "metrics"):
        return False
    return options["entropy"] is not None or options["top_entropy"] is None


def _grpo(
    loss_type: str, importance_level: str, scale_rewards: str | None, old: bool, ref: float | None, kl: str,
    sampler: str | None, least: float | None, off_policy: float | None, delta: float | None, mask: bool, counts: bool,
    total: Any, entropy: float | None, top_entropy: Any, num_samples: int, dtype: torch.dtype, offsets: torch.dtype,
) -> None:  # fmt: skip
    T, N = 64, num_samples
    count = new(dtype=total) if isinstance(total, torch.dtype) else total
    source: Options = {"advantages_N": new(N)}
    if scale_rewards is not None:
        source = {"rewards_N": new(N), "group_ids_N": new(N, dtype=INT64), "scale_rewards": scale_rewards}
    if sampler not in (None, "metrics"):
        source |= {"is_mode": sampler, "is_cap": 2.0, "is_min": least}
    if top_entropy is not None:
        source |= {"top_entropy_quantile": 0.2}
    loss, _ = kernels.grpo_loss(
        new(T, dtype=dtype, learns=True), new(N + 1, dtype=offsets), **source,
        old_logprobs_T=new(T) if old else None,
        ref_logprobs_T=None if ref is None else new(T), beta=ref or 0.0, kl_estimator=kl,
        sampler_logprobs_T=new(T, dtype=dtype) if sampler else None, off_policy_mask_threshold=off_policy,
        loss_mask_T=new(T, dtype=torch.bool) if mask else None, delta=delta, loss_type=loss_type,
        importance_level=importance_level, max_completion_length=32 if loss_type == "dr_grpo" else None,
        num_items=count, num_samples=count, counts_N=new(N, dtype=offsets) if counts else None,
        entropy_T=None if entropy is None else new(T, learns=True), entropy_coef=entropy or 0.0,
        entropy_threshold=new(dtype=top_entropy) if isinstance(top_entropy, torch.dtype) else None,
    )  # fmt: skip
    backward(loss)


def _sample(dtype: torch.dtype, how: dict[str, Any], vocab: int) -> None:
    kernels.sample_tokens(new(2, vocab, dtype=dtype), **how)


def _route(
    dtype: torch.dtype, experts: int, top_k: int, groups: tuple[int, int], scoring: str, norm: bool, bias: bool,
    replay: bool,
) -> None:  # fmt: skip
    _, weights, _ = kernels.route_topk(
        new(3, experts, dtype=dtype, learns=True), new(experts) if bias else None, top_k=top_k, n_group=groups[0],
        topk_group=groups[1], norm_topk_prob=norm, scoring=scoring,
        replay_ids_TK=new(3, top_k, dtype=INT64) if replay else None,
    )  # fmt: skip
    backward(weights)


def _dispatch(experts: int, top_k: int) -> None:
    kernels.moe_dispatch(new(300, top_k, dtype=INT64), experts)


# Rows an expert: sampling, in between, training; then widths that tiles divide, that they do not, and 1.
_ROWS, _WIDTHS = (3, 100, 2000), ((2048, 768), (31, 17), (1, 1))
_EVEN = ((2048, 768), (40, 24))


def _grouped(dtype: torch.dtype, rows: int, widths: tuple[int, int], transpose: bool, experts: int) -> None:
    weight = (experts, widths[1], widths[0]) if transpose else (experts, *widths)
    backward(kernels.grouped_gemm(
        new(rows * experts, widths[0], dtype=dtype, learns=True), new(*weight, dtype=dtype, learns=True),
        new(experts, dtype=INT32), transpose_weight=transpose,
    ))  # fmt: skip


def _experts(
    dtype: torch.dtype, rows: int, widths: tuple[int, int], experts: int, top_k: int, learns: tuple[bool, ...]
) -> None:
    """learns: hidden, gate_up, down, weights."""
    (width, inner), num_tokens = widths, -(-rows * experts // top_k)
    backward(kernels.moe_experts(
        new(num_tokens, width, dtype=dtype, learns=learns[0]),
        new(experts, 2 * inner, width, dtype=dtype, learns=learns[1]),
        new(experts, width, inner, dtype=dtype, learns=learns[2]), new(num_tokens, top_k, dtype=INT64),
        new(num_tokens, top_k, learns=learns[3]),
    ))  # fmt: skip


def _decode(
    dtype: torch.dtype,
    widths: tuple[int, int],
    shared: bool,
    heads: tuple[int, int],
    table_width: int,
    window: int | None,
    soft_cap: float | None,
) -> None:
    """shared: values are channels of the keys, as of latent attention."""
    (width, value_width), (num_heads, num_kv_heads) = widths, heads
    keys = new(64, num_kv_heads, width, dtype=dtype)
    values = keys[..., :value_width] if shared else new(64, num_kv_heads, value_width, dtype=dtype)
    kernels.decode_attention(
        new(2, num_heads, width, dtype=dtype), keys, values, new(2, table_width, dtype=INT32), new(2, dtype=INT32),
        scale=0.1, window=window, soft_cap=soft_cap,
    )  # fmt: skip


def _decode_parts(dtype: torch.dtype, widths: tuple[int, int], heads: tuple[int, int], rope: bool, norms: bool) -> None:
    """widths: of the model and of its MLP; the head's is that of the model over the query heads, at most 128."""
    (width, inner_width), (num_heads, num_kv_heads) = widths, heads
    head_dim, B = min(128, width // num_heads // 2 * 2), 2
    x_BD, channels = new(B, width, dtype=dtype), new(head_dim, dtype=dtype)
    parts.add_rms_norm(x_BD, x_BD, new(width, dtype=dtype), eps=1e-6)
    angles = new(B, head_dim // 2, dtype=dtype)
    slots = new(64, num_kv_heads, head_dim, dtype=dtype)
    parts.rotate_and_write(
        new(B, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype), (slots, slots), new(B, dtype=INT64),
        rope=(angles, angles) if rope else None, norms=(channels, channels) if norms else None, eps=1e-6,
    )  # fmt: skip
    parts.swiglu(new(B, 2 * inner_width, dtype=dtype))
    nope, latent, rotated = (128, 512, 64) if width % 16 == 0 else (10, 18, 6)
    both = new(B, num_heads * (nope + rotated) + latent + rotated, dtype=dtype)
    q_BX, kv_BC = both.split((num_heads * (nope + rotated), latent + rotated), dim=1)
    angles = new(B, rotated // 2, dtype=dtype)
    parts.rotate_latents(
        q_BX.unflatten(1, (num_heads, -1)), kv_BC, new(64, 1, latent + rotated, dtype=dtype), new(B, dtype=INT64),
        rope=(angles, angles, rope), norm_C=new(latent, dtype=dtype), eps=1e-6,
    )  # fmt: skip


CASES: dict[str, Case] = {
    "selective_logprobs": Case(
        {"dtype": FLOATS, "entropy": (False, True), "inplace": (False, True), "vocab": (152_064, 50, 1),
         "whole": (True, False)}, _selective,
    ),
    "heads": Case(
        {"op": ("logprobs", "cross_entropy", "grpo_loss"), "dtype": FLOATS, "num_tokens": (5, 20_000),
         "vocab": (32_000, 151_669), "entropy": (False, True)}, _head,
        lambda options: options["op"] == "logprobs" or not options["entropy"],
    ),
    "group_advantages": Case(
        {"dtype": FLOATS, "scale": ("group", "batch", "none"), "num_samples": (1, 512)}, _advantages
    ),
    "grpo_loss": Case(GRPO_OPTIONS, _grpo, _grpo_is_valid),
    "sample_tokens": Case(
        {"dtype": FLOATS, "vocab": (152_064, 50, 1),
         "how": ({}, {"temperature": 0.0}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.9})}, _sample,
    ),
    "route_topk": Case(
        {"dtype": FLOATS, "experts": (256, 128, 60, 512, 8), "top_k": (8, 6, 1), "groups": ((1, 1), (4, 4), (4, 2)),
         "scoring": ("sigmoid", "softmax"), "norm": (True, False), "bias": (False, True), "replay": (False, True)},
        _route, lambda options: options["top_k"] <= options["experts"] // options["groups"][0] * options["groups"][1],
    ),
    "moe_dispatch": Case({"experts": (256, 128, 60, 8, 1), "top_k": (8, 1)}, _dispatch),
    "grouped_gemm": Case(
        {"dtype": FLOATS, "rows": _ROWS, "widths": _WIDTHS, "transpose": (True, False), "experts": (16, 1)}, _grouped
    ),
    "grouped_gemm of torch": Case(
        {"dtype": (BF16,), "rows": (2000,), "widths": _EVEN, "transpose": (True, False), "experts": (16, 1)}, _grouped
    ),
    "moe_experts": Case(
        {"dtype": FLOATS, "rows": _ROWS, "widths": _WIDTHS, "experts": (128, 1), "top_k": (8, 1),
         "learns": ((True,) * 4, (True, False, False, False), (False, True, True, False), (False, False, False, True),
                    (False,) * 4)}, _experts,
    ),
    "decode_layers": Case(
        {"dtype": FLOATS, "widths": ((1536, 8960), (8192, 28_672), (896, 4864), (33, 17)),
         "heads": ((12, 2), (64, 8), (1, 1)), "rope": (True, False), "norms": (False, True)}, _decode_parts,
        lambda options: options["widths"][0] >= 2 * options["heads"][0],
    ),
    "moe_experts around torch": Case(
        {"dtype": (BF16,), "rows": (2000,), "widths": _EVEN, "experts": (128, 1), "top_k": (8, 1),
         "learns": ((True,) * 4, (False, False, True, False), (False,) * 4)}, _experts,
    ),
    "decode_attention": Case(
        {"dtype": FLOATS, "widths": ((128, 128), (64, 64), (256, 256), (576, 512), (192, 128), (33, 33), (16, 1)),
         "shared": (False, True), "heads": ((32, 8), (128, 1), (1, 1)), "table_width": (1, 40),
         "window": (None, 100), "soft_cap": (None, 50.0)}, _decode,
    ),
}  # fmt: skip


def covering(
    options: dict[str, Sequence[Any]], strength: int, valid: Callable[[Options], bool] = lambda _: True
) -> list[Options]:
    """Choices in which any `strength` of the options meet in every valid way; few, not fewest."""
    draw = random.Random(0)

    def fill(fixed: Options) -> Options:
        return {name: draw.choice(values) for name, values in options.items()} | fixed

    def tuples(choice: Options) -> set[tuple[tuple[str, int], ...]]:
        places = [(name, options[name].index(value)) for name, value in choice.items()]
        return set(combinations(places, min(strength, len(places))))

    missing = {
        tuple(zip(names, places))
        for names in combinations(options, min(strength, len(options)))
        for places in product(*(range(len(options[name])) for name in names))
    }
    chosen: list[Options] = []
    while missing:
        wanted = min(missing)
        fixed = {name: options[name][place] for name, place in wanted}
        candidates = [choice for choice in (fill(fixed) for _ in range(60)) if valid(choice)]
        if candidates:
            chosen.append(max(candidates, key=lambda choice: len(tuples(choice) & missing)))
            missing -= tuples(chosen[-1])
        missing.discard(wanted)  # no choice holds it: it is not valid
    return chosen
