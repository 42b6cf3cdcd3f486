"""A decoder's skeleton for the tests of r1fast.parallel: the attribute names of models/decoder.py and every kind of
parameter it has (matrices, stacked experts, vectors, a buffer, optionally tied heads), and the work done on it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from r1fast.models.decoder import Decoder
from r1fast.parallel.mesh import Dist
from r1fast.parallel.optim import ShardOptimizer, build_optimizer
from r1fast.parallel.parallelize import gathered_blocks, parallelize, tied_names
from tests import zoo

NUM_TOKENS_OF_RANK = (7, 13)  # unequal: a mean of per-rank means would differ from the mean over tokens


class Head(nn.Module):
    def __init__(self, num_embeddings: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, width))

    def forward(self, hidden_TD: torch.Tensor, fn: Callable[..., Any] | None = None) -> Any:
        return hidden_TD @ self.weight.T if fn is None else fn(hidden_TD, self.weight)


class Block(nn.Module):
    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width, bias=False)
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.Parameter(torch.empty(num_experts, width, width))
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        h_TD = self.norm(x_TD)
        scores_TE = torch.softmax(self.gate(h_TD) + self.e_score_correction_bias, -1).to(h_TD.dtype)
        mixed_TD = torch.einsum("te,edf,td->tf", scores_TE, self.experts, h_TD)
        return x_TD + mixed_TD + self.down_proj(F.silu(self.up_proj(h_TD)))


class TinyDecoder(nn.Module):
    """vocab 17 and 3 experts divide by no number of ranks."""

    def __init__(self, *, tied: bool = False, width: int = 8, num_layers: int = 2, vocab: int = 17) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=tied)
        self.embed_tokens = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width, 3) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = Head(vocab, width)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        generator = torch.Generator().manual_seed(0)
        for param in self.parameters():
            nn.init.normal_(param, std=0.3, generator=generator)

    def forward(self, input_ids_T: torch.Tensor, *, head: Callable[..., Any] | None = None) -> Any:
        x_TD = self.embed_tokens(input_ids_T)
        for layer in self.layers:
            x_TD = layer(x_TD)
        return self.lm_head(self.norm(x_TD), head)

    def decode(self, input_ids_B: torch.Tensor) -> torch.Tensor:
        """An entry point that is not forward, as in the rollout engine."""
        return TinyDecoder.forward(self, input_ids_B)


def tokens_of_rank(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(0, 17, (NUM_TOKENS_OF_RANK[rank],), generator=generator)


def loss_of(model: nn.Module, input_ids_T: torch.Tensor, num_items: int = sum(NUM_TOKENS_OF_RANK)) -> torch.Tensor:
    """This part's share of the mean over num_items tokens; the product with the vocabulary happens inside the head."""

    def head(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits_TV = (hidden_TD @ weight_VD.T).float()
        return F.cross_entropy(logits_TV, input_ids_T.flip(0), reduction="sum") / num_items, {}

    return model(input_ids_T, head=head)[0]


def backward_all(model: nn.Module, dist: Dist | None = None) -> None:
    """One step's gradient: the parts of both ranks, one after another on one rank or one on each of two."""
    for rank in (dist.rank,) if dist is not None and dist.world_size == 2 else (0, 1):
        loss_of(model, tokens_of_rank(rank)).backward()


def sharded(dist: Dist, *, tied: bool = False, **options: Any) -> nn.Module:
    return parallelize(TinyDecoder(tied=tied), dist, **{"param_dtype": torch.float32, **options})


def train(model: nn.Module, dist: Dist, num_steps: int, optimizer: ShardOptimizer | None = None) -> ShardOptimizer:
    optimizer = optimizer or build_optimizer(model, learning_rate=1e-2, weight_decay=0.1)
    for _ in range(num_steps):
        backward_all(model, dist)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def moe_decoder() -> Decoder:
    """The real thing, small: MLA, a dense layer, a MoE layer of 5 experts."""
    return zoo.decoder("deepseek_v3", vocab_size=17, n_routed_experts=5, moe_intermediate_size=24)


def decoder_gradients(dist: Dist | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """backward_all for the real decoder; sharded if dist is given, one packed sequence per rank."""
    model = moe_decoder() if dist is None else parallelize(moe_decoder(), dist, param_dtype=torch.float32, **options)
    for rank in (dist.rank,) if dist is not None and dist.world_size == 2 else (0, 1):
        input_ids_T = tokens_of_rank(rank)
        cu_seqlens = torch.tensor([0, 3, input_ids_T.numel()], dtype=torch.int32)
        F.cross_entropy(model(input_ids_T, cu_seqlens), input_ids_T.flip(0), reduction="sum").backward()
    return {name: full(param.grad) for name, param in model.named_parameters() if param.grad is not None}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor().detach().clone() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def full_state_dict(model: nn.Module, dist: Dist) -> dict[str, torch.Tensor]:
    """The whole model on rank 0, put together from the blocks of an export; {} on other ranks. Collective."""
    state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
    missing = {name: len(tensor) for name, tensor in state.items()}
    for name, first, rows in gathered_blocks(model, dist):
        state[name][first : first + len(rows)] = rows.detach()
        missing[name] -= len(rows)
    for first_name, *others in tied_names(model):
        state |= dict.fromkeys(others, state[first_name])
        missing |= dict.fromkeys(others, 0)
    assert set(missing.values()) <= {0}, missing
    return state if dist.is_main else {}
