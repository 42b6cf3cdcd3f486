"""Low-rank adapters (LoRA, arXiv 2106.09685): beside a frozen weight W two small factors are trained.

    y = W x + scale B (A dropout(x))     A [r, in], B [out, r], scale = alpha / r; of experts [E, r, in], [E, out, r]

An adapter is a module beside the weight that it adapts: `q_proj.weight_lora` of `q_proj.weight`. It is two thin
products, of experts grouped ones, over the rows that are sorted for the base. Nothing of the size of W is made, and W
gets no gradient. To generate, W + scale B A takes the place of the gathered W (`merged`): decoding knows no adapter.

On disk an adapter is a folder as peft writes it: lora_files.py.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from r1fast.models.model_config import ModelConfig
from r1fast.models.names import Blocks, pieces_of
from r1fast.models.structure import structure_of, unwrapped
from r1fast_kernels import grouped_gemm
from r1fast_kernels.products import linear

ALL_LINEAR = "all-linear"
_SUFFIX = "_lora"


@dataclass(frozen=True)
class LoraConfig:
    r: int = 16
    alpha: float = 32
    target_modules: str | Sequence[str] = ALL_LINEAR  # or names, or ends of names: o_proj, experts.down_proj
    dropout: float = 0.0  # of x


class LoRA(nn.Module):
    """The adapter of one weight. off: it adds nothing."""

    def __init__(self, config: LoraConfig, shape: torch.Size, index: int, noise: list[int]) -> None:
        """shape: of the weight. index, noise: what the dropout mask is drawn from; `noise` is one number for all."""
        super().__init__()
        *experts, num_out, num_in = shape
        self.A = nn.Parameter(torch.empty(*experts, config.r, num_in, dtype=torch.float32))
        self.B = nn.Parameter(torch.empty(*experts, num_out, config.r, dtype=torch.float32))
        self.scale, self.dropout = config.alpha / config.r, config.dropout
        self._index, self._noise = index, noise
        # Here, as torch's compiler takes seconds to import.
        self._drop = torch.compiler.disable(_drop) if config.dropout else None
        self._off = False

    @property
    def is_on(self) -> bool:
        return not self._off

    def forward(self, x: Tensor, out: Tensor, offsets_E: Tensor | None = None) -> Tensor:
        """out, which is W x, with the adapter's part. offsets_E: where each expert's rows of x end."""
        if self._off:
            return out
        if self.training and self._drop is not None:
            x = self._drop(x, self.dropout, self._noise[0], self._index)
        if offsets_E is None:
            return out + linear(linear(x, self.A) * self.scale, self.B)
        return out + grouped_gemm(grouped_gemm(x, self.A, offsets_E) * self.scale, self.B, offsets_E)


def _drop(x: Tensor, share: float, noise: int, index: int) -> Tensor:
    """The same mask where activations are recomputed: no state of a generator is carried on."""
    generator = torch.Generator(x.device).manual_seed(zlib.crc32(f"{noise},{index}".encode()))
    keep = torch.empty_like(x, requires_grad=False).bernoulli_(1 - share, generator=generator)
    return x * keep.div_(1 - share)


class Adapted(NamedTuple):
    """A weight with its adapter."""

    name: str  # of the weight in the decoder
    module: nn.Module  # that owns it
    attribute: str
    lora: LoRA


def adapted(model: nn.Module) -> Iterator[Adapted]:
    for name, module in model.named_modules():
        for child, lora in module.named_children():
            if isinstance(lora, LoRA):
                attribute = child.removesuffix(_SUFFIX)
                yield Adapted(unwrapped(f"{name}.{attribute}"), module, attribute, lora)


def is_adapter(name: str) -> bool:
    """Of a parameter: whether it is an adapter's, A or B."""
    return f"{_SUFFIX}." in name


def hf_name(name: str, shape: Iterable[int], config: ModelConfig) -> str:
    """What transformers calls the weight: for experts it stacks them too, and some projections are one there."""
    shape = tuple(shape)
    return f"model.{name}" if len(shape) == 3 else next(pieces_of(name, shape, config)).name


def target_name(name: str) -> str:
    """What `target_modules` calls it: a linear layer, or stacked weights."""
    return name.removesuffix(".weight")


def matches(target: str, name: str) -> bool:
    """As peft: the name, or its end from a dot on."""
    return f".{target_name(name)}".endswith(f".{target}")


def add_adapters(decoder: Any, config: LoraConfig) -> None:
    """Give each targeted weight of a decoder (on meta, as a rule) an adapter, and freeze all others but a scalar head.

    "all-linear" is every linear layer inside the blocks and every stack of experts; router, embedding and head are
    none. Adapters are fp32 and not initialized: `init_adapters`. ValueError for a name that is not there.
    """
    every = dict(_targets(decoder))
    names = sorted({hf_name(name, weight.shape, decoder.config) for name, (_, _, weight) in every.items()})
    targets = config.target_modules
    for target in () if targets == ALL_LINEAR else targets:
        if not any(matches(target, name) for name in names):
            known = ", ".join(sorted({target_name(name).rpartition(".")[2] for name in names}))
            raise ValueError(
                f"target_modules: {target!r:.80} is no linear layer of this model; expected some of {known}"
            )
    decoder.requires_grad_(False)
    noise, index = [0], {name: i for i, name in enumerate(names)}
    for name, (module, attribute, weight) in every.items():
        on_disk = hf_name(name, weight.shape, decoder.config)
        if targets == ALL_LINEAR or any(matches(target, on_disk) for target in targets):
            if config.dropout and weight.ndim == 3:
                advice = "leave dropout at 0, or experts out of target_modules"
                raise ValueError(f"dropout: {on_disk} is stacked experts, for which peft has none; {advice}")
            with weight.device:
                setattr(module, attribute + _SUFFIX, LoRA(config, weight.shape, index[on_disk], noise))
    if decoder.scalar_head:
        decoder.score.float().requires_grad_(True)
    tie_adapters(decoder)
    decoder.built = structure_of(decoder)  # what generation finds, with the adapters merged


def _targets(decoder: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str, nn.Parameter]]]:
    for name, module in decoder.named_modules():
        for attribute, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3 or (isinstance(module, nn.Linear) and attribute == "weight"):
                yield f"{name}.{attribute}", (module, attribute, weight)


def tie_adapters(decoder: Any) -> None:
    """Projections that are one on disk have one A, as one adapter of that has; each has its rows of B."""
    first: dict[str, nn.Parameter] = {}
    for name, _, _, lora in adapted(decoder) if decoder.config.family.fused else ():
        lora.A = first.setdefault(hf_name(name, (*lora.B.shape[:-1], lora.A.shape[-1]), decoder.config), lora.A)


@torch.no_grad()
def init_adapters(model: nn.Module, parts: Iterable[tuple[str, int, Tensor]], seed: int) -> None:
    """As peft: A uniform in +-1/sqrt(in) (kaiming_uniform_(a=sqrt(5))), B zero; the same on any number of ranks.

    parts: (plain name, first row, rows) of the model's parameters, to be written to; others than adapters' stay.
    """
    shapes = {unwrapped(name): param.shape for name, param in model.named_parameters(remove_duplicate=False)}
    for name, start, rows in parts:
        if name.endswith(f"{_SUFFIX}.A"):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed},{name}".encode()))
            bound = shapes[name][-1] ** -0.5
            whole = torch.empty(shapes[name]).uniform_(-bound, bound, generator=generator)
            rows.copy_(whole[start : start + len(rows)])
        elif name.endswith(f"{_SUFFIX}.B"):
            rows.zero_()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that the adapters were added to."""
    found = [lora for *_, lora in adapted(model) if lora.is_on]  # of one inside another: none
    for lora in found:
        lora._off = True
    try:
        yield
    finally:
        for lora in found:
            lora._off = False


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside generation_phase: write W + scale B A over each gathered W, and leave the adapters out.

    The gathered copies are thrown away at the end of that phase, so nothing is ever subtracted: the base cannot drift.
    """
    with torch.no_grad(), adapters_off(model):
        for _, module, attribute, lora in adapted(model):
            add_product(getattr(module, attribute), lora.A, lora.B, lora.scale)
        yield


def add_product(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """weight += scale B A in place, rounded once."""
    a, b = a.to(weight.dtype), b.to(weight.dtype)
    (weight.addmm_ if weight.ndim == 2 else weight.baddbmm_)(b, a, alpha=scale)


def set_noise(model: nn.Module, seed: int) -> None:
    """What the dropout masks of the next forward pass, and of its recomputation, are drawn from."""
    for *_, lora in adapted(model):
        lora._noise[0] = seed
        return


class Factors(NamedTuple):
    """An adapter by itself: whole, fp32."""

    a: Tensor
    b: Tensor
    scale: float

    def rows(self, start: int, stop: int) -> Tensor:
        """What it adds to these rows of the weight (of experts: to these experts)."""
        return self.scale * (self.b[start:stop] @ (self.a if self.a.ndim == 2 else self.a[start:stop]))


@torch.no_grad()
def factors_of(model: nn.Module, whole: Callable[[Tensor], Tensor]) -> dict[str, Factors]:
    """By the name of the adapted weight. whole: gathers a parameter; collective where it is."""
    return {
        name: Factors(whole(lora.A.detach()), whole(lora.B.detach()), lora.scale) for name, _, _, lora in adapted(model)
    }


def merged_blocks(blocks: Blocks, factors: dict[str, Factors]) -> Blocks:
    """Blocks of a model's weights (export.py) with the adapters in them, fp32 where there are some."""
    for name, start, rows in blocks:
        if name in factors:
            yield name, start, rows.float() + factors[name].rows(start, start + len(rows)).to(rows.device)
        elif not is_adapter(name):
            yield name, start, rows


def summary(model: nn.Module) -> str:
    """What is trained, in one line."""
    names = {target_name(name) for name, *_ in adapted(model)}
    kinds = sorted({f"experts.{last}" if before.endswith(".experts") else last
                    for before, _, last in (name.rpartition(".") for name in names)})  # fmt: skip
    params = list(model.parameters())
    trained, total = sum(p.numel() for p in params if p.requires_grad), sum(p.numel() for p in params)
    return f"lora trains {trained:,} parameters beside {total - trained:,}: {len(names)} weights ({', '.join(kinds)})"
