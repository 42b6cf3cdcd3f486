"""Prompts that sequences share are computed once: the same loss, gradients and routing as of whole sequences."""

import pytest
import torch
from torch import Tensor

from r1fast.models.decoder import Decoder
from r1fast.models.shared_tokens import SharedTokens
from tests import zoo

SHARED_S = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 0, 1, 2, 7, 8, 9])  # 5 + 5 + 4 tokens, and 2 of their own
CU_SEQLENS = torch.tensor([0, 5, 10, 14, 16], dtype=torch.int32)


def run(decoder: Decoder, ids_T: Tensor, shared_S: Tensor | None, learned: Tensor) -> tuple[Tensor, list, Tensor]:
    """Logits of the learned tokens, every gradient, and the sum of what the routers did."""
    decoder.zero_grad()
    logits, routing = decoder(
        ids_T, CU_SEQLENS, head=lambda hidden_TD, weight_VD: hidden_TD[learned] @ weight_VD.T, shared_S=shared_S,
        balance_scale=torch.tensor(0.1), with_routing=True,
    )  # fmt: skip
    logits.log_softmax(-1)[:, 7].sum().backward()
    routed = torch.zeros(1) if routing is None else torch.cat((routing.expert_ids.flatten(), routing.balance[None]))
    return logits.detach(), [None if p.grad is None else p.grad.clone() for p in decoder.parameters()], routed


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_as_whole_sequences(family: str) -> None:
    decoder = zoo.decoder(family, vocab_size=64, initializer_range=0.3).double()
    ids_T = torch.randint(3, 60, (10,), generator=torch.Generator().manual_seed(1))
    own = torch.tensor([3, 4, 8, 9, 13, 14, 15])  # of the sequences
    want = run(decoder, ids_T[SHARED_S], None, own)
    got = run(decoder, ids_T, SHARED_S, SHARED_S[own])
    # The balance loss is computed in fp32.
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_replayed_experts_are_those_of_the_sequences() -> None:
    decoder = zoo.decoder("deepseek_v3", vocab_size=64, initializer_range=0.3).double()
    ids_T = torch.randint(3, 60, (10,), generator=torch.Generator().manual_seed(1))
    shape = len(SHARED_S), sum(1 for _ in decoder.moe_layers()), 2
    some_TLK = torch.arange(10).view(-1, 1, 1).expand(10, *shape[1:]) % 2 + torch.tensor([0, 2])
    replay = some_TLK[SHARED_S]
    whole, routing = decoder(ids_T[SHARED_S], CU_SEQLENS, replay_ids_TLK=replay, with_routing=True)
    shared, same = decoder(ids_T, CU_SEQLENS, replay_ids_TLK=replay, with_routing=True, shared_S=SHARED_S)
    torch.testing.assert_close(shared[SHARED_S], whole)
    assert torch.equal(routing.expert_ids, replay) and torch.equal(same.expert_ids, replay)


def test_gradients() -> None:
    shared = SharedTokens(SHARED_S, 10)
    x_T, x_S = (torch.randn(n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (10, 16))
    assert torch.equal(shared.once(shared.repeat(x_T)), x_T)
    assert torch.autograd.gradcheck(shared.repeat, x_T) and torch.autograd.gradcheck(shared.once, x_S)


@pytest.mark.parametrize("num_inputs", [9, 11])
def test_every_input_has_a_place(num_inputs: int) -> None:
    with pytest.raises(ValueError, match=f"shared_S names 10 inputs, expected each of {num_inputs}"):
        SharedTokens(SHARED_S, num_inputs)
