"""What a decode step does between its products and its attention, in all layers of a model: bench_decode_parts times
it, and bench/modelled.py reads its kernels."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from r1fast_kernels import decode_parts as parts

Call = Callable[[str | None], list[Tensor]]


@dataclass(frozen=True)
class Sizes:
    layers: int
    width: int
    inner: tuple[tuple[int, int], ...]  # (layers, width of their MLP, or of shared experts)
    heads: int
    kv_heads: int
    head_dim: int
    latent: int = 0  # channels; with latent attention head_dim counts those that are not rotated
    rotated: int = 0

    @property
    def joined(self) -> int:
        """Numbers that a row's queries, keys and values are, as far as they are read and written."""
        if self.latent:
            return (self.heads + 1) * self.rotated + self.latent
        return (self.heads + 2 * self.kv_heads) * self.head_dim


SIZES = {
    "qwen2.5-1.5b": Sizes(28, 1536, ((28, 8960),), 12, 2, 128),
    "v3-16b-a3b": Sizes(27, 2048, ((1, 11_264), (26, 2816)), 16, 1, 128, latent=512, rotated=64),
}


def step_bytes(mode: str, rows: int, itemsize: int) -> tuple[int, int]:
    """(read, written) of a step: sums and norms, two a layer; rotation with its angles; SwiGLU."""
    x = SIZES[mode]
    once = x.layers * (4 * x.width + x.joined) + sum(layers * width for layers, width in x.inner)
    more = x.layers * (x.rotated or x.head_dim) + sum(layers * width for layers, width in x.inner)
    written = rows * itemsize * once
    return written + rows * itemsize * more, written


def step(mode: str, rows: int, normal: Callable[..., Tensor], slots_B: Tensor) -> Call:
    """A call that runs it by an implementation, on normal(*shape) numbers; row i writes slot slots_B[i] of `rows`."""
    x, rotation = SIZES[mode], SIZES[mode].rotated or SIZES[mode].head_dim
    hidden_BD, delta_BD, norm_D = normal(rows, x.width), normal(rows, x.width), normal(x.width)
    rope = normal(rows, rotation // 2), normal(rows, rotation // 2)
    gate_up = [(layers, normal(rows, 2 * width)) for layers, width in x.inner]
    if x.latent:
        q_BHd, kv_BC = normal(rows, x.heads, x.head_dim + x.rotated), normal(rows, x.latent + x.rotated)
        latent_S1C, norm_C = normal(rows, 1, x.latent + x.rotated), normal(x.latent)
    else:
        qkv_BX = normal(rows, x.joined)
        cache = normal(rows, x.kv_heads, x.head_dim), normal(rows, x.kv_heads, x.head_dim)

    def attention(impl: str | None) -> list[Tensor]:
        if x.latent:
            query_BHC = parts.rotate_latents(
                q_BHd, kv_BC, latent_S1C, slots_B, rope=(*rope, True), norm_C=norm_C, eps=1e-6, impl=impl
            )
            return [query_BHC[..., x.latent :], latent_S1C]
        return [parts.rotate_and_write(qkv_BX, cache, slots_B, rope=rope, impl=impl), *cache]

    def run(impl: str | None) -> list[Tensor]:
        found: list[Tensor] = []
        for _ in range(x.layers):
            found = [*parts.add_rms_norm(hidden_BD, delta_BD, norm_D, eps=1e-6, impl=impl), *attention(impl)]
            parts.add_rms_norm(hidden_BD, delta_BD, norm_D, eps=1e-6, impl=impl)
        for layers, gate_up_BX in gate_up:
            for _ in range(layers):
                inner_BF = parts.swiglu(gate_up_BX, impl=impl)
            found.append(inner_BF)
        return found

    return run
