"""Generation by RolloutEngine against transformers' generate: the same checkpoint, in one process, in turns.

N prompts of about 20 tokens, L new tokens each, temperature 1, no end-of-sequence token, log-probs returned.
Floor: 2 FLOPs of each active parameter and new token, as products of N rows. vLLM is a peer of the dense model where it
can be imported: on a CPU in an environment of its own, `make bench-vllm`. Models of full size have another floor and
other baselines: large.py.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from bench import harness, large
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
# Random weights in the shapes of models that people train on a CPU.
SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip
QWEN25 = Qwen2Config(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip
MODELS: dict[str, PretrainedConfig] = {
    "moe": MOE, "dense": DENSE, "smollm2-135m": SMOLLM2, "qwen2.5-0.5b": QWEN25,
}  # fmt: skip
CHECKED = 16  # rows, for their logits are kept


@contextmanager
def vllm(folder: Path, dtype: torch.dtype, prompts: list[list[int]], L: int) -> Iterator[harness.Run]:
    """vLLM in this process, whose threads it takes. Compiled, and with nothing to find in a prefix cache."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vllm is imported
    from vllm import LLM
    from vllm import SamplingParams as VllmParams

    llm = LLM(
        str(folder), skip_tokenizer_init=True, dtype=str(dtype).removeprefix("torch."), max_num_seqs=len(prompts),
        max_num_batched_tokens=8192, enable_prefix_caching=False, gpu_memory_utilization=0.1,
        logprobs_mode="processed_logprobs", disable_log_stats=True,
    )  # fmt: skip
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    params = VllmParams(max_tokens=L, ignore_eos=True, logprobs=0, flat_logprobs=True, detokenize=False)

    def run() -> harness.Outputs:
        samples = [output.outputs[0] for output in llm.generate(inputs, params, use_tqdm=False)]
        return [torch.tensor([x.token_ids for x in samples]), torch.tensor([x.logprobs.logprobs for x in samples])]

    try:
        yield run
    finally:
        llm.llm_engine.engine_core.shutdown()  # else it looks for its process group when Python exits


def test_generate(case: Case, compare: Callable[[harness.Problem], None], tmp_path: Path) -> None:
    if case.mode in large.MODELS:
        compare(large.problem(case))
        return
    N, L = case.sizes["N"], case.sizes["L"]
    dtype, config = harness.DTYPES[case.dtype], MODELS[case.mode]
    if not can_multiply(torch.empty(0, dtype=dtype, device=harness.DEVICE)):
        pytest.skip(f"torch has no fast {case.dtype} product on this CPU")
    generator = torch.Generator().manual_seed(0)
    prompts_NP = torch.randint(config.vocab_size, (N, 20), generator=generator)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=dtype, device=harness.DEVICE)[0].eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).to(harness.DEVICE).eval()
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
        if len(outputs) > 1:
            sequences_NS = torch.cat((prompts_NP, ids_NL), dim=1)[:CHECKED].to(harness.DEVICE)
            with torch.no_grad():
                logits = theirs(sequences_NS).logits[:, 19:-1].float()
            want = logits.log_softmax(-1).gather(-1, sequences_NS[:, 20:, None]).squeeze(-1).cpu()
            difference = (outputs[1][:CHECKED] - want).abs()
            # Of random weights a few tokens lie between two experts, and go to either.
            allowed = (1e-4 if case.dtype == "fp32" else 0.1) * (1 if name == harness.OURS else 10)
            assert difference.quantile(0.99) < allowed, f"{name}: {difference.quantile(0.99)}"

    floor = harness.products_floor(2.0 * active_parameters(model) * N * L, N, dtype)
    contenders = {harness.OURS: ours, "transformers": transformers}
    with ExitStack() as stack:
        if case.mode == "dense" and importlib.util.find_spec("vllm") is not None:
            contenders["vLLM"] = stack.enter_context(vllm(tmp_path, dtype, prompts, L))
        compare(harness.Problem(case, contenders, floor=floor, check=check))
