"""Models of full size on a GPU, with random weights that are made there: what bench_generate, bench_train_step and
bench_grpo_step measure of them.

Generation: N prompts of P tokens, L new tokens each, all of them in the time, as are captured graphs.
Floor: 2 FLOPs of each active parameter and prompt token in bare products, and at copy bandwidth what L steps read: all
weights (256 rows meet every expert) and the keys and values of every row. "prefill alone": our call for one new token.
"transformers, decode alone": its `generate` goes on behind P + L / 2 cached tokens for a few steps, whose time counts
for all L; its own prefill is left out.

Training step: N sequences of L tokens in bf16, mean cross-entropy, fused AdamW, beside transformers' model with torch's
attention; "any order" is ours without trainer.deterministic. Floor: 6 FLOPs a parameter and token in bare products.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, DynamicCache, PretrainedConfig, Qwen2Config

from bench import harness
from bench.cases import Case
from r1fast.models.cache import BlockCache
from r1fast.models.decoder import Decoder
from r1fast.models.model_config import ModelConfig
from r1fast.parallel.ordered import ordered_sums
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import SamplingParams
from r1fast_kernels import linear_cross_entropy, selective_logprobs
from r1fast_kernels.decode_attention import BLOCK

MODELS: dict[str, PretrainedConfig] = {
    "qwen2.5-1.5b": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
    ),
    # DeepSeek-V3's layers in the shape of Moonlight-16B-A3B.
    "v3-16b-a3b": DeepseekV3Config(
        vocab_size=163840, hidden_size=2048, intermediate_size=11264, num_hidden_layers=27, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=4096, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, n_group=1,
        topk_group=1, moe_intermediate_size=1408, first_k_dense_replace=1, tie_word_embeddings=False,
    ),
}  # fmt: skip
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "kv_lora_rank": 32, "head_dim": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "qk_head_dim": 32, "v_head_dim": 16, "n_routed_experts": 8, "moe_intermediate_size": 32,
}  # fmt: skip
if harness.FAKE:
    for name, config in MODELS.items():
        fields = {key: SMALL.get(key, value) for key, value in config.to_dict().items() if key != "layer_types"}
        MODELS[name] = type(config).from_dict(fields)
PEER, PEER_STEPS = "transformers, decode alone", 4 if harness.FAKE else 32
PART = 8192  # a run of the floor does this part of its work


def problem(case: Case) -> harness.Problem:
    N, P, L = (case.sizes[letter] for letter in "NPL")
    dtype, config = harness.DTYPES[case.dtype], MODELS[case.mode]
    model = random_decoder(config, dtype)
    prompts_NP = torch.randint(config.vocab_size, (N, P), generator=torch.Generator().manual_seed(0))
    engine = RolloutEngine(model, None, max_num_seqs=N)

    def ours(max_tokens: int) -> harness.Outputs:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        completions = [group[0] for group in engine.generate(prompts_NP.tolist(), params)]
        return [torch.tensor([c.token_ids for c in completions]), torch.tensor([c.logprobs for c in completions])]

    def check(name: str, outputs: harness.Outputs) -> None:
        if name != harness.OURS:
            return
        ids_NL, logprobs_NL = outputs
        assert ids_NL is not None and logprobs_NL is not None and ids_NL.shape == (N, L)
        assert_sampled(model, torch.cat((prompts_NP, ids_NL), dim=1)[:2], logprobs_NL[:2])

    def numbers(median_ms: dict[str, float]) -> dict[str, float]:
        few, many = (harness.kernels_of(lambda steps=steps: ours(steps)) for steps in (L // 4, L // 2))
        decode_ms = median_ms[harness.OURS] - median_ms["prefill alone"]
        return {
            "tokens/s in decode steps": N * (L - 1) / decode_ms * 1e3,
            "kernels a decode step": (many - few) / (L // 2 - L // 4),
        }

    contenders = {harness.OURS: lambda: ours(L), "prefill alone": lambda: ours(1)}
    if PEER in {target.than for target in case.targets}:
        contenders[PEER] = transformers_decode(config, dtype, N, P + L // 2)
    return harness.Problem(
        case, contenders, floor=floor(model, N, P, L), check=check, scale={PEER: L / PEER_STEPS}, numbers=numbers
    )


def assert_sampled(model: Decoder, sequences_NS: Tensor, logprobs_NL: Tensor) -> None:
    """The log-probs of the last L tokens are what the model gives them."""
    for ids_S, logprobs_L in zip(sequences_NS.to(harness.DEVICE), logprobs_NL):
        L = len(logprobs_L)
        with torch.no_grad():
            logits_SV = model(ids_S, torch.tensor([0, len(ids_S)], dtype=torch.int32))
            want_L = selective_logprobs(logits_SV[-L - 1 : -1], ids_S[-L:])
        # In bf16 some tokens lie between two experts, and go to either.
        assert (logprobs_L.to(want_L) - want_L).abs().quantile(0.9) < 0.1


def random_decoder(config: PretrainedConfig, dtype: torch.dtype) -> Decoder:
    with torch.device("meta"):
        model = Decoder(ModelConfig.from_hf(config)).to(dtype)
    model.to_empty(device=harness.DEVICE).init_weights(harness.generator())
    return model.requires_grad_(False).eval()


def floor(model: Decoder, N: int, P: int, L: int) -> harness.Floor:
    config, embedding = model.config, model.embed_tokens.weight
    weights = sum(param.numel() for param in model.parameters())
    routed = sum(param.numel() for moe in model.moe_layers() for param in moe.experts.parameters())
    if not config.tie_word_embeddings:
        weights -= embedding.numel()  # of a separate one, N rows are read
    active = weights - (routed - routed * config.num_experts_per_tok // config.n_routed_experts if routed else 0)
    cached = BlockCache.bytes_per_block(config, embedding.dtype) / BLOCK * N * (P + L / 2)
    total = L * (weights * embedding.element_size() + cached)
    # The head is for the last token of a prompt only.
    flops = 2.0 * (active - embedding.numel()) * N * P
    copy = harness.stream_floor("", total / PART)
    x_TD = torch.randn(8192, 4096, device=harness.DEVICE, dtype=embedding.dtype)
    weight_DF = torch.randn(
        4096, max(1, round(flops / PART / (2 * x_TD.numel()))), device=x_TD.device, dtype=x_TD.dtype
    )

    def run() -> None:
        copy.run()
        torch.mm(x_TD, weight_DF)

    what = f"{flops / 1e12:,.0f} TFLOP of prefill, {total / L / 1e9:.1f} GB read in each of {L} steps (copy bandwidth)"
    return replace(copy, what=what, run=run, scale=PART, bytes=total, flops=flops)


def transformers_decode(config: PretrainedConfig, dtype: torch.dtype, N: int, context: int) -> harness.Run:
    with torch.device(harness.DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        ids_NS = torch.randint(config.vocab_size, (N, context + 1))
        cache = DynamicCache(config=config)
        ours = ModelConfig.from_hf(config)
        for layer in range(config.num_hidden_layers):
            cache.update(*torch.randn(2, N, ours.kv_heads, context, ours.attention_head_dim, dtype=dtype), layer)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None

    def run() -> harness.Outputs:
        with torch.no_grad():
            found_NS = model.generate(
                ids_NS, past_key_values=cache, max_new_tokens=PEER_STEPS, do_sample=True, top_k=0, pad_token_id=0,
                attention_mask=torch.ones_like(ids_NS),
            )  # fmt: skip
        cache.crop(-PEER_STEPS)
        assert found_NS.shape[1] - ids_NS.shape[1] == PEER_STEPS and cache.get_seq_length() == context
        return [found_NS[:, -PEER_STEPS:]]

    return run


def train_problem(case: Case) -> harness.Problem:
    N, L = case.sizes["N"], case.sizes["L"]
    dtype, config = harness.DTYPES[case.dtype], MODELS[case.mode]
    generator, device = harness.generator(), torch.device(harness.DEVICE)
    ids_NL = torch.randint(config.vocab_size, (N, L), generator=generator, device=device)
    cu_seqlens = torch.arange(N + 1, dtype=torch.int32, device=device) * L
    targets_T = torch.cat([ids_NL[:, 1:], torch.full_like(ids_NL[:, :1], -100)], 1).flatten()
    ours = random_decoder(config, dtype).requires_grad_(True).train()
    with device:
        theirs = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()

    def our_loss() -> Tensor:
        return ours(
            ids_NL.flatten(), cu_seqlens,
            head=lambda hidden_TD, weight_VD: linear_cross_entropy(hidden_TD, weight_VD, targets_T),
        )  # fmt: skip

    def exact() -> Tensor:
        """Of the first sequence in plain torch: the loss of random weights is nearly that of every other one."""
        with torch.no_grad():
            hidden_TD, weight_VD = ours(ids_NL[0], cu_seqlens[:2], head=lambda *given: given)
            return F.cross_entropy((hidden_TD @ weight_VD.T).float()[:-1], ids_NL[0, 1:])

    def step(model: nn.Module, loss_of: Callable[[], Tensor], *, ordered: bool) -> harness.Run:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

        def run() -> harness.Outputs:
            with ordered_sums(device, ordered):
                loss = loss_of()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return [loss.detach()]

        return run

    contenders = {
        harness.OURS: step(ours, our_loss, ordered=True),
        "any order": step(ours, our_loss, ordered=False),
        "transformers": step(theirs, lambda: theirs(ids_NL, labels=ids_NL, use_cache=False).loss, ordered=False),
    }
    check = harness.agrees_with([exact()], 1e-2)
    floor = of_products(6.0 * sum(param.numel() for param in ours.parameters()) * N * L, dtype)

    def numbers(median_ms: dict[str, float]) -> dict[str, float]:
        return {"tokens/s": N * L / median_ms[harness.OURS] * 1e3}

    return harness.Problem(case, contenders, floor=floor, check=check, repeated=True, numbers=numbers)


def of_products(flops: float, dtype: torch.dtype) -> harness.Floor:
    """A part of them in one large product."""
    rows, width = (64, 64) if harness.FAKE else (8192, 4096)
    x_TD, weight_DD = (torch.randn(n, width, device=harness.DEVICE, dtype=dtype) for n in (rows, width))
    part = flops / (2.0 * x_TD.numel() * width)
    return harness.Floor(f"{flops / 1e12:,.3g} TFLOP in large products", lambda: x_TD @ weight_DD, part, flops=flops)
