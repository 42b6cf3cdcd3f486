"""Generation by RolloutEngine against transformers' generate: the same checkpoint, in one process, in turns.

N prompts of about 20 tokens, L new tokens each, temperature 1, no end-of-sequence token, log-probs returned.
Floor: 2 FLOPs of each active parameter and new token, as products of N rows.
"""

import tempfile
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config

from bench import harness
from bench.bench_train_step import CONFIG as MOE
from bench.bench_train_step import active_parameters
from bench.cases import Case
from bench.head import can_multiply
from r1fast.models.weights import load_model
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import SamplingParams

DENSE = Qwen2Config(
    vocab_size=98, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip
MODELS: dict[str, PretrainedConfig] = {"moe": MOE, "dense": DENSE}


def test_generate(case: Case, compare: Callable[[harness.Problem], None]) -> None:
    N, L = case.sizes["N"], case.sizes["L"]
    dtype, config = harness.DTYPES[case.dtype], MODELS[case.mode]
    if not can_multiply(torch.empty(0, dtype=dtype, device=harness.DEVICE)):
        pytest.skip(f"torch has no fast {case.dtype} product on this CPU")
    generator = torch.Generator().manual_seed(0)
    prompts_NP = torch.randint(config.vocab_size, (N, 20), generator=generator)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        model = load_model(folder, dtype=dtype, device=harness.DEVICE)[0].eval()
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(harness.DEVICE).eval()
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = None
    engine = RolloutEngine(model, None, max_num_seqs=N)
    params = SamplingParams(n=1, max_tokens=L, ignore_eos=True)
    prompts = prompts_NP.tolist()

    def ours() -> harness.Outputs:
        completions = [group[0] for group in engine.generate(prompts, params)]
        return [torch.tensor([c.token_ids for c in completions]), torch.tensor([c.logprobs for c in completions])]

    def transformers() -> harness.Outputs:
        with torch.no_grad():
            ids = theirs.generate(
                prompts_NP.to(harness.DEVICE), max_new_tokens=L, do_sample=True, top_k=0, pad_token_id=0,
                attention_mask=torch.ones_like(prompts_NP, device=harness.DEVICE),
            )  # fmt: skip
        return [ids[:, 20:]]

    def check(name: str, outputs: harness.Outputs) -> None:
        ids_NL = outputs[0]
        assert ids_NL is not None and ids_NL.shape == (N, L), f"{name}: {outputs[0]}"
        if name == harness.OURS:
            sequences_NS = torch.cat((prompts_NP, ids_NL), dim=1).to(harness.DEVICE)
            with torch.no_grad():
                logits = theirs(sequences_NS).logits[:, 19:-1].float()
            want = logits.log_softmax(-1).gather(-1, sequences_NS[:, 20:, None]).squeeze(-1).cpu()
            difference = (outputs[1] - want).abs()
            # Of random weights a few tokens lie between two experts, and go to either.
            assert difference.quantile(0.99) < (1e-4 if case.dtype == "fp32" else 0.1), difference.quantile(0.99)

    floor = harness.products_floor(2.0 * active_parameters(model) * N * L, N, dtype)
    compare(harness.Problem(case, {harness.OURS: ours, "transformers": transformers}, floor=floor, check=check))
