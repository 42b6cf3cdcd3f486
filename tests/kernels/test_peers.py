"""Other people's implementations as oracles: the same numbers on ordinary input, and where one of them is wrong.

Their torch code runs here; their Triton kernels run interpreted, in a process of their own (see test_interpreter.py).
Peers that are not installed are skipped: pip install -e .[peers].
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1fast_kernels import dispatch, grpo_loss, linear_grpo_loss, linear_logprobs, selective_logprobs

LENGTHS = (7, 1, 11, 5)  # one sample of a single token, one as long as the padded batch
D, V = 16, 101
TEMPERATURES = [1.0, 0.7]


def assert_near(got: Tensor, want: Tensor) -> None:
    """1e-5 of the largest value: both are fp32 and sum in other orders."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def head() -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [N, L, D], weight [V, D], ids [N, L]); logits of standard deviation 3."""
    generator = torch.Generator().manual_seed(0)
    shape = len(LENGTHS), max(LENGTHS)
    hidden = torch.randn(*shape, D, generator=generator).requires_grad_()
    weight = (3 / D**0.5 * torch.randn(V, D, generator=generator)).requires_grad_()
    return hidden, weight, torch.randint(V, shape, generator=generator)


def kept_tokens() -> tuple[Tensor, Tensor]:
    """(mask [N, L], cu_seqlens) of right-padded completions."""
    lengths = torch.tensor(LENGTHS)
    mask = torch.arange(max(LENGTHS)) < lengths[:, None]
    return mask, torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()


def policies(logprobs: Tensor) -> dict[str, Tensor]:
    """Log-probs of older, reference and sampling policies, far enough away to be clipped; advantages of both signs."""
    generator = torch.Generator().manual_seed(1)

    def near(center: Tensor, spread: float) -> Tensor:
        return center + spread * torch.randn(center.shape, generator=generator)

    old = near(logprobs.detach(), 0.4)
    return {
        "old": old,
        "ref": near(logprobs.detach(), 0.3),
        "sampler": near(old, 0.5),
        # Mostly positive: a loss whose terms cancel has no 1e-5 to compare.
        "advantages": torch.tensor([1.3, -0.3, 0.9, -0.4]),
    }


if not dispatch.INTERPRETING:

    def peer_logprobs(peer: str, hidden_TD: Tensor, weight_VD: Tensor, ids_T: Tensor, temperature: float) -> Any:
        if peer == "TRL":
            chunked = pytest.importorskip("trl.kernels.chunked_logprob").ChunkedLogProbFunction
            # Chunks of 32 columns: 101 end in a shorter one.
            return chunked.apply(hidden_TD, weight_VD, None, ids_T, temperature, 32, None, 1.0, ("entropy",))[:2]
        liger = pytest.importorskip("liger_kernel.ops.fused_linear_scaled_cross_entropy")
        negated, entropy_T = liger.LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden_TD, weight_VD, ids_T, temperature, return_entropy=True
        )
        return -negated, entropy_T

    @pytest.mark.parametrize("temperature", TEMPERATURES)
    @pytest.mark.parametrize("peer", ["TRL", "Liger"])
    def test_linear_logprobs(peer: str, temperature: float) -> None:
        """Values, entropies, and both gradients of a sum in which every token weighs differently."""
        hidden, weight, ids = head()
        hidden_TD, ids_T = hidden.detach().flatten(0, 1).requires_grad_(), ids.flatten()
        weights = torch.linspace(0.5, -1, len(ids_T)), torch.linspace(-1, 2, len(ids_T))
        want = peer_logprobs(peer, hidden_TD, weight, ids_T, temperature)
        got = linear_logprobs(hidden_TD, weight, ids_T, temperature=temperature, with_entropy=True)
        want_gradients = torch.autograd.grad(want, [hidden_TD, weight], weights)
        got_gradients = torch.autograd.grad(got, [hidden_TD, weight], weights)
        for g, w in zip([*got, *got_gradients], [*want, *want_gradients], strict=True):
            assert_near(g.detach(), w.detach())

    LOSSES = [
        ("grpo", {}), ("grpo", {"delta": 1.2}), ("bnpo", {}), ("dapo", {}), ("dr_grpo", {"max_completion_length": 16}),
        ("cispo", {"epsilon_high": 1.3}), ("grpo", {"importance_level": "sequence"}),
    ]  # fmt: skip

    @pytest.mark.parametrize("temperature", TEMPERATURES)
    @pytest.mark.parametrize("is_cap", [None, 1.3], ids=["", "truncated-is"])
    @pytest.mark.parametrize("beta", [0.0, 0.05], ids=["", "beta"])
    @pytest.mark.parametrize(("loss_type", "options"), LOSSES, ids=str)
    def test_linear_grpo_loss(
        loss_type: str, options: dict[str, Any], beta: float, is_cap: float | None, temperature: float
    ) -> None:
        """Loss, the gradients of hidden and weight, and the metrics that both have."""
        liger = pytest.importorskip("liger_kernel.chunked_loss")
        hidden, weight, ids = head()
        mask, cu_seqlens = kept_tokens()
        with torch.no_grad():
            logprobs_T = linear_logprobs(hidden.flatten(0, 1), weight, ids.flatten(), temperature=temperature)
        other = policies(logprobs_T.view(mask.shape))

        names = {"importance_level": "importance_sampling_level"}
        fused = liger.LigerFusedLinearGRPOLoss(
            beta=beta, loss_type=loss_type, temperature=temperature, compiled=False, use_ref_model=bool(beta),
            **{"epsilon_low": 0.2, "epsilon_high": 0.2} | {names.get(key, key): x for key, x in options.items()},
        )  # fmt: skip
        want, want_metrics = fused(
            hidden, weight, ids, mask.float(), other["advantages"], old_per_token_logps=other["old"],
            ref_per_token_logps=other["ref"] if beta else None,
            vllm_is_ratio=None if is_cap is None else (other["old"] - other["sampler"]).exp().clamp(max=is_cap),
        )  # fmt: skip
        got, got_metrics = linear_grpo_loss(
            hidden[mask], weight, ids[mask], cu_seqlens, temperature=temperature, advantages_N=other["advantages"],
            old_logprobs_T=other["old"][mask], ref_logprobs_T=other["ref"][mask] if beta else None, beta=beta,
            sampler_logprobs_T=other["sampler"][mask], is_cap=is_cap, loss_type=loss_type, **options,
        )  # fmt: skip
        assert_near(got.detach(), want.detach())
        for g, w in zip(torch.autograd.grad(got, [hidden, weight]), torch.autograd.grad(want, [hidden, weight])):
            assert_near(g, w)
        if beta:
            assert_near(got_metrics["kl"], want_metrics[0])
        if loss_type != "cispo" and not options:
            assert_near(got_metrics["clip_ratio/region_mean"], want_metrics[-1])
            assert want_metrics[-1] > 0.1  # else clipping was not compared

    def test_trl_has_no_entropy_for_a_masked_vocabulary() -> None:
        """A bias of -inf forbids a token. TRL multiplies probability 0 by -inf; ours counts it as 0."""
        chunked = pytest.importorskip("trl.kernels.chunked_logprob").ChunkedLogProbFunction
        hidden, weight, ids = head()
        hidden_TD, ids_T = hidden.detach().flatten(0, 1), ids.flatten().clamp(min=1)
        bias_V = torch.zeros(V)
        bias_V[0] = -float("inf")
        theirs = chunked.apply(hidden_TD, weight, bias_V, ids_T, 1.0, 32, None, 1.0, ("entropy",))
        ours = linear_logprobs(hidden_TD, weight, ids_T, bias_V=bias_V, with_entropy=True)
        want = linear_logprobs(hidden_TD, weight[1:], ids_T - 1, with_entropy=True, impl="reference")
        assert_near(theirs[0].detach(), want[0].detach())
        assert theirs[1].isnan().all(), "TRL has learnt it: make this a comparison"
        for got, exact in zip(ours, want):
            assert_near(got.detach(), exact.detach())

    @pytest.mark.parametrize("package", ["trl", "liger_kernel"])
    def test_their_triton_kernels(package: str) -> None:
        """The tests below, in a process that interprets Triton."""
        pytest.importorskip(package)
        command = [sys.executable, "-m", "pytest", __file__, "-k", f"interpreted and {package}"]
        result = subprocess.run(
            [*command, "-p", "no:cacheprovider"], env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
        assert " passed" in result.stdout and "skipped" not in result.stdout

else:

    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_interpreted_trl_selective_logprobs(temperature: float) -> None:
        peer = pytest.importorskip("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy
        generator = torch.Generator().manual_seed(0)
        logits = (3 * torch.randn(3, 1500, generator=generator)).requires_grad_()  # its blocks are of 1024 columns
        ids = torch.randint(1500, (3,), generator=generator)
        weights = torch.linspace(0.5, -1, 3), torch.linspace(-1, 2, 3)
        want = peer(logits, ids, temperature)
        got = selective_logprobs(logits, ids, temperature=temperature, with_entropy=True, impl="triton")
        (want_gradient,) = torch.autograd.grad(want, logits, weights)
        (got_gradient,) = torch.autograd.grad(got, logits, weights)
        for g, w in zip([*got, got_gradient], [*want, want_gradient], strict=True):
            assert_near(g.detach(), w.detach())

    def test_interpreted_trl_has_no_entropy_for_a_masked_vocabulary() -> None:
        peer = pytest.importorskip("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy
        logits = 3 * torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
        logits[:, 7] = -float("inf")
        logits.requires_grad_()
        ids = torch.tensor([3, 4])
        theirs = peer(logits, ids)
        assert theirs[1].isnan().all(), "TRL has learnt it: make this a comparison"
        assert torch.autograd.grad(theirs[1].sum(), logits)[0].isnan().any()
        want = selective_logprobs(logits, ids, with_entropy=True, impl="reference")
        ours = selective_logprobs(logits, ids, with_entropy=True, impl="triton")
        for got, exact in zip(ours, want):
            assert_near(got.detach(), exact.detach())
        gradients = [torch.autograd.grad(entropy.sum(), logits)[0] for _, entropy in (ours, want)]
        assert_near(*gradients)

    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_interpreted_liger_kernel_selective_logprobs(temperature: float) -> None:
        peer = pytest.importorskip("liger_kernel.ops.grpo_loss").fused_selective_log_softmax
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(2, 4, 300, generator=generator)  # it leaves the last of four positions out
        ids = torch.randint(300, (2, 3), generator=generator)
        got = selective_logprobs(logits[:, :-1].flatten(0, 1), ids.flatten(), temperature=temperature, impl="triton")
        assert_near(got, peer(logits, ids, temperature).flatten())

    @pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
    def test_interpreted_liger_kernel_grpo_loss(loss_type: str) -> None:
        """From logits to loss and the gradient of the logits, where a masked token's must be 0."""
        peer = pytest.importorskip("liger_kernel.transformers.grpo_loss").triton_grpo_loss
        generator = torch.Generator().manual_seed(0)
        mask, cu_seqlens = kept_tokens()
        N, L = mask.shape
        logits = (3 * torch.randn(N, L + 1, V, generator=generator)).requires_grad_()
        ids = torch.randint(V, (N, L), generator=generator)
        logprobs_T = selective_logprobs(logits[:, :-1][mask], ids[mask], temperature=0.7, impl="triton")
        other = policies(torch.zeros(N, L).masked_scatter(mask, logprobs_T.detach()))
        want, want_metrics = peer(
            logits, other["old"], other["ref"], ids, other["advantages"], mask.float(), temperature=0.7, beta=0.05,
            eps_low=0.2, eps_high=0.28, inplace=False, loss_type=loss_type, reduce=True,
        )  # fmt: skip
        got, got_metrics = grpo_loss(
            logprobs_T, cu_seqlens, advantages_N=other["advantages"], old_logprobs_T=other["old"][mask],
            ref_logprobs_T=other["ref"][mask], beta=0.05, epsilon=0.2, epsilon_high=0.28, loss_type=loss_type,
        )  # fmt: skip
        assert_near(got.detach(), want.detach())
        assert_near(got_metrics["kl"], want_metrics[0])
        assert_near(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0])
