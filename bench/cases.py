"""What is measured, on which device, and what was asked of it. Data only: no torch, so that the report stays light.

Sizes: T tokens, V vocabulary, D model width, N samples, G of them for a prompt, L mean tokens a sample, P tokens of a
prompt, B sequences that decode, E experts, K experts per token, F expert width, H heads.
"""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Target:
    """speedup: `than`'s time over ours;  memory: our peak over `than`'s;  fraction: the floor's time over ours;
    ms: our time;  extra GB: our peak beyond the gradients."""

    measure: str
    bound: float
    than: str = ""

    def __str__(self) -> str:
        return {
            "speedup": f">= {self.bound:g}x {self.than}",
            "memory": f"<= {self.bound:g} of the memory of {self.than}",
            "fraction": f">= {self.bound:.0%} of the floor",
            "ms": f"<= {self.bound:g} ms",
            "extra GB": f"<= {self.bound:g} GB beyond the gradients",
        }[self.measure]

    def met(self, value: float) -> bool:
        return value >= self.bound if self.measure in ("speedup", "fraction") else value <= self.bound


def faster(than: str, times: float) -> Target:
    return Target("speedup", times, than)


def smaller(than: str, share: float) -> Target:
    return Target("memory", share, than)


def of_floor(share: float) -> Target:
    return Target("fraction", share)


@dataclass(frozen=True)
class Case:
    op: str
    device: str  # cpu or cuda
    dtype: str
    mode: str  # fwd, bwd, fwd+bwd; for sample_tokens what is cut off
    sizes: dict[str, int] = field(hash=False)
    targets: tuple[Target, ...] = ()

    @property
    def name(self) -> str:
        return "-".join([*(f"{letter}{size}" for letter, size in self.sizes.items()), self.dtype, self.mode])

    @property
    def small(self) -> "Case":
        """The same where nothing is measured: sizes that a CPU takes no second for."""
        most = {"T": 64, "V": 512, "D": 64, "F": 32, "N": 8, "G": 4, "L": 16, "P": 16, "B": 8, "E": 8, "K": 2, "H": 4}
        return replace(self, sizes={letter: min(size, most[letter]) for letter, size in self.sizes.items()})


def _selective() -> list[Case]:
    op, cases = "selective_logprobs", []
    # A micro-batch with Llama-2's vocabulary, a decode batch of the small recipe, a few rows of Qwen2.5's.
    for T, V in ((1024, 32000), (4096, 128), (32, 151936)):
        for dtype in ("fp32", "bf16"):
            for mode, times in (("fwd", 7), ("fwd+bwd", 5)):
                targets = (faster("eager", times),) if V == 32000 else ()
                cases.append(Case(op, "cpu", dtype, mode, {"T": T, "V": V}, targets))
    on_gpu = {"T": 8192, "V": 151936}
    cases.append(Case(op, "cuda", "bf16", "fwd", on_gpu, (of_floor(0.85),)))
    cases.append(Case(op, "cuda", "bf16", "bwd", on_gpu, (of_floor(0.8),)))
    return cases


def _linear() -> list[Case]:
    cases = []
    head = {"T": 2048, "D": 512, "V": 65536}
    large = {"T": 16384, "D": 4096, "V": 128256}
    on_cpu = {
        "linear_logprobs": (faster("eager", 1), smaller("eager", 0.25), faster("TRL", 1)),
        "linear_cross_entropy": (),
        "linear_grpo_loss": (faster("two ops", 1.2),),
    }
    peers = ("compile", "TRL", "Liger", "CCE, no entropy")
    on_gpu = {
        "linear_logprobs": (of_floor(0.8), Target("extra GB", 2 * 1.073741824), *(faster(peer, 1) for peer in peers)),
        "linear_cross_entropy": (),
        "linear_grpo_loss": (Target("ms", 85),),
    }
    for op, targets in on_cpu.items():
        samples = op == "linear_grpo_loss"
        for dtype in ("fp32", "bf16"):
            sizes = head | ({"N": 16} if samples else {}) | ({} if targets else {"T": 512})
            cases.append(Case(op, "cpu", dtype, "fwd+bwd", sizes, targets))
        if op == "linear_logprobs":
            cases.append(Case(op, "cuda", "bf16", "fwd", large))
        cases.append(Case(op, "cuda", "bf16", "fwd+bwd", large | ({"N": 32} if samples else {}), on_gpu[op]))
    return cases


def _losses() -> list[Case]:
    cases = [
        Case("group_advantages", device, "fp32", "fwd", {"N": 4096, "G": 16}, (faster("reference", 1),))
        for device in ("cpu", "cuda")
    ]
    sizes = {"cpu": ((32, 40), (1024, 1024)), "cuda": ((1024, 1024), (1024, 4096), (1024, 16384))}
    for device, pairs in sizes.items():
        for N, L in pairs:
            targets = {"cpu": (faster("eager", 8),), "cuda": (of_floor(0.5),)}[device] if N * L >= 1 << 20 else ()
            cases.append(Case("grpo_loss", device, "fp32", "fwd+bwd", {"N": N, "L": L}, targets))
    return cases


def _sampling() -> list[Case]:
    op = "sample_tokens"
    sizes = {"cpu": ({"B": 256, "V": 128}, {"B": 64, "V": 151936}), "cuda": ({"B": 256, "V": 151936},)}
    return [
        Case(op, device, "fp32", mode, size)
        for device, several in sizes.items()
        for size in several
        for mode in ("plain", "top_k=50", "top_p=0.95")
    ]


def _norms() -> list[Case]:
    return [
        Case("rms_norm", "cpu", dtype, "fwd+bwd", {"T": 24576, "D": 128}, (faster("eager", 1),))
        for dtype in ("fp32", "bf16")
    ]


def _attention() -> list[Case]:
    """The small recipe's kind of layer on 24,576 tokens, and a Llama-like one on 8,192."""
    sizes = {"mla": {"N": 96, "L": 256, "H": 4}, "gqa": {"N": 8, "L": 1024, "H": 8}}
    return (
        [
            Case("packed_attention", "cpu", dtype, mode, sizes[mode], (faster("SDPA", 1),))
            for dtype in ("fp32", "bf16")
            for mode in sizes
        ]
        + [
            Case("decode_attention", "cpu", dtype, mode, {"B": 256, "T": T}, (faster("SDPA", 1),))
            for dtype in ("fp32", "bf16")
            for mode in sizes
            for T in (84, 512)
        ]
        + [
            Case("decode_attention", "cuda", "bf16", mode, size, (of_floor(0.7),))
            for mode, size in (("gqa", {"B": 256, "T": 1536}), ("mla", {"B": 128, "T": 2048}))
        ]
        + [Case("decode_attention", "cuda", "bf16", "mla128", {"B": 128, "T": 2048})]
        # Qwen2.5-1.5B's heads of 128, and DeepSeek-V3's of 192 with values of 128.
        + [
            Case("packed_attention", "cuda", "bf16", mode, size, (faster("SDPA", 1),))
            for mode, size in (("gqa", {"N": 8, "L": 2048, "H": 12}), ("mla", {"N": 8, "L": 2048, "H": 16}))
        ]
    )


def _steps() -> list[Case]:
    """24,576 packed tokens."""
    sizes = {"N": 96, "L": 256}
    return [
        Case("train_step", "cpu", "fp32", "step", sizes, (faster("grouped_mm", 1.5),)),
        Case("train_step", "cpu", "bf16", "step", sizes, (faster("grouped_mm", 3), faster("grouped_mm fp32", 3))),
        Case("train_step", "cuda", "bf16", "step", sizes),
        Case("train_step", "cuda", "bf16", "qwen2.5-1.5b", {"N": 8, "L": 1024}, (faster("transformers", 1),)),
    ]


def _grpo_steps() -> list[Case]:
    """16 prompts with 8 completions each."""
    sizes = {"N": 128, "G": 8, "L": 64}
    return [
        Case("grpo_step", "cpu", "fp32", "step", sizes, (faster("TRL", 1.7),)),
        Case("grpo_step", "cpu", "bf16", "step", sizes, (faster("TRL", 4), faster("TRL fp32", 4))),
        Case("grpo_step", "cuda", "bf16", "step", sizes),
        Case("grpo_step", "cuda", "bf16", "qwen2.5-1.5b", {"N": 128, "G": 8, "L": 256}),
        *(
            Case("grpo_step", "cpu", dtype, model, {"N": 32, "G": 8, "L": 48}, (faster("TRL", 2.2),))
            for model in ("smollm2-135m", "qwen2.5-0.5b")
            for dtype in ("fp32", "bf16")
        ),
    ]


def _decode_parts() -> list[Case]:
    """Of a dense model, and of one with latent attention and experts."""
    return [Case("decode_parts", "cuda", "bf16", model, {"B": 256}) for model in ("qwen2.5-1.5b", "v3-16b-a3b")]


def _generation() -> list[Case]:
    times, full = {"moe": 5, "dense": 2}, {"N": 256, "P": 1024, "L": 256}
    on_dense = of_floor(0.6), faster("transformers, decode alone", 10)
    beside_vllm = {("dense", "fp32"): (faster("vLLM", 1.8),), ("dense", "bf16"): (faster("vLLM", 1),)}
    return (
        [
            Case("decode_layers", "cpu", dtype, model, {"B": 256, "T": 52}, (faster("modules", 1), faster("eager", 2)))
            for model in times
            for dtype in ("fp32", "bf16")
        ]
        + [Case("decode_layers", "cuda", "bf16", "qwen2.5-1.5b", {"B": 256, "T": 64}, (faster("modules", 1.2),))]
        + [
            Case(
                "generate",
                "cpu",
                dtype,
                model,
                {"N": 256, "L": 64},
                (faster("transformers", times[model]), *beside_vllm.get((model, dtype), ())),
            )
            for model in times
            for dtype in ("fp32", "bf16")
        ]
        + [
            Case(op, "cpu", dtype, model, size, (target,))
            for model in ("smollm2-135m", "qwen2.5-0.5b")
            for dtype, ratio in (("fp32", 3), ("bf16", 3.5))
            for op, size, target in (
                ("decode_layers", {"B": 64, "T": 44}, of_floor(0.7)),
                ("generate", {"N": 64, "L": 48}, faster("transformers", ratio)),
            )
        ]
        + [
            Case("generate", "cuda", "bf16", "dense", {"N": 256, "L": 64}, (faster("transformers", 10),)),
            Case("generate", "cuda", "bf16", "qwen2.5-1.5b", full, on_dense),
            Case("generate", "cuda", "bf16", "v3-16b-a3b", full, (of_floor(0.4),)),
        ]
    )


def _experts() -> list[Case]:
    small = {"T": 4096, "D": 256, "F": 128, "E": 32, "K": 4}
    large = {"D": 2048, "F": 768, "E": 128, "K": 8}  # Qwen3-30B-A3B
    router = {"T": 4096, "E": 32, "K": 4}
    ahead = faster("grouped_mm", 1), faster("Liger", 1), faster("scattermoe", 1)
    cases = [
        Case("route_topk", device, "fp32", "fwd+bwd", router, (faster("transformers", 3),))
        for device in ("cpu", "cuda")
    ]
    for dtype, times in (("fp32", 1.5), ("bf16", 2.5)):
        targets = faster("grouped_mm", times), faster("eager", times)
        cases.append(Case("moe_experts", "cpu", dtype, "fwd+bwd", small, targets))
        cases.append(Case("moe_experts", "cpu", dtype, "module", small, targets[:1]))
    modes = "fwd", "fwd+bwd"
    cases += [Case("grouped_gemm", "cpu", dtype, mode, small) for dtype in ("fp32", "bf16") for mode in modes]
    cases += [
        Case("grouped_gemm", "cuda", "bf16", mode, {"T": T, **large}, ahead[:1])
        for T in (8192, 16384, 32768)
        for mode in modes
    ]
    for T in (8192, 16384, 32768):
        # 400 TFLOP/s forward and 330 with the backward pass, in milliseconds.
        flops = 6.0 * T * large["K"] * large["D"] * large["F"]
        for mode, total, rate in (("fwd", flops, 400e12), ("fwd+bwd", 3 * flops, 330e12)):
            target = Target("ms", round(total / rate * 1e3, 2))
            cases.append(Case("moe_experts", "cuda", "bf16", mode, {"T": T, **large}, (target, *ahead)))
    return cases


FAMILIES = (
    _selective, _linear, _losses, _experts, _sampling, _norms, _attention, _decode_parts, _steps, _grpo_steps,
    _generation,
)  # fmt: skip
CASES = tuple(case for family in FAMILIES for case in family())
OPS = tuple(dict.fromkeys(case.op for case in CASES))


def cases_of(op: str, device: str) -> list[Case]:
    return [case for case in CASES if (case.op, case.device) == (op, device)]
