"""The decoder: packed forward for training and prefill, one-token decode for generation.

    embed -> [ norm -> attention -> + -> norm -> MLP or MoE -> + ] x layers -> norm -> head
Where norms stand, and all else that families differ in: families.py.

Single-device: sharding is applied from outside, so weights are read only inside forward of the module that owns them;
decode reads them directly and needs them whole.
"""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from r1fast.models.attention import AttentionPlan, ForwardPass
from r1fast.models.cache import BlockCache, DecodeStep
from r1fast.models.gqa import GroupedQueryAttention
from r1fast.models.layers import MLP, Embedding, Head, HeadFn, RMSNorm
from r1fast.models.lora import tie_adapters
from r1fast.models.mla import LatentAttention
from r1fast.models.model_config import ModelConfig
from r1fast.models.moe import MoE, Routing
from r1fast.models.rope import Rotary
from r1fast.models.shared_tokens import SharedTokens
from r1fast.models.structure import structure_of

Attention = GroupedQueryAttention | LatentAttention
_ATTENTION: dict[str, type[Attention]] = {"grouped": GroupedQueryAttention, "latent": LatentAttention}


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm_names = config.family.norms
        self._add_norms(config, 0)
        self.self_attn: Attention = _ATTENTION[config.family.attention](config, layer_idx)
        self._add_norms(config, 1, 2)
        dense = (config.hidden_size, config.intermediate_size, config.mlp_bias, config.family.activation)
        self.mlp: MoE | MLP = MoE(config) if config.is_moe_layer(layer_idx) else MLP(*dense)
        self._add_norms(config, 3)

    def forward(
        self, x_TD: Tensor, step: ForwardPass, replay_ids_TK: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        out_TD = self.self_attn(self._norm(0, x_TD), step)
        return self._mlp(x_TD + self._norm(1, out_TD), step, replay_ids_TK)

    def decode(self, x_BD: Tensor, step: DecodeStep) -> tuple[Tensor, Routing | None]:
        out_BD = self.self_attn.decode(self._norm(0, x_BD), step)
        return self._mlp(x_BD + self._norm(1, out_BD))

    def _mlp(self, x_TD: Tensor, *routing_args: Any) -> tuple[Tensor, Routing | None]:
        normed_TD = self._norm(2, x_TD)
        if not isinstance(self.mlp, MoE):
            return x_TD + self._norm(3, self.mlp(normed_TD)), None
        out_TD, routing = self.mlp(normed_TD, *routing_args)
        return x_TD + self._norm(3, out_TD), routing

    def _add_norms(self, config: ModelConfig, *places: int) -> None:
        for name in (self.norm_names[place] for place in places):
            if name is not None:
                setattr(self, name, RMSNorm(config.hidden_size, config.rms_norm_eps, config.family.norm_offset))

    def _norm(self, place: int, x_TD: Tensor) -> Tensor:
        """The norm before attention, after it, before the MLP or after it, where there is one."""
        name = self.norm_names[place]
        return x_TD if name is None else getattr(self, name)(x_TD)


def _of_model(routings: list[Routing | None], plan: AttentionPlan | None = None) -> Routing | None:
    """The layers' routing as one, of every token of the sequences; None without experts."""
    if not (found := [routing for routing in routings if routing is not None]):
        return None
    balances = [routing.balance for routing in found if routing.balance is not None]
    expert_ids_TLK = torch.stack([routing.expert_ids for routing in found], dim=1)
    if plan is not None:
        expert_ids_TLK = plan.repeat(expert_ids_TLK)
    return Routing(expert_ids_TLK, torch.stack(balances).sum() if balances else None)


class Decoder(nn.Module):
    """A causal language model, or with scalar_head=True a reward model: `score` [1, D] in place of `lm_head`.

    Parameter names are Hugging Face's without the leading `model.`; experts are stacked. May be built on meta: then
    to_empty, and load or init_weights.
    """

    def __init__(self, config: ModelConfig, *, scalar_head: bool = False) -> None:
        super().__init__()
        self.config, self.scalar_head = config, scalar_head
        self.generation_config: dict[str, Any] = {}  # of the checkpoint that it was read from: how to sample by default
        scale = config.hidden_size**0.5 if config.family.scales_embedding else 1.0
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, scale)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.family.norm_offset)
        self.rotary = Rotary(config)
        if scalar_head:
            self.score = Head(config.hidden_size, 1)
        else:
            self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.tie_weights()
        self.built = structure_of(self)

    def tie_weights(self) -> None:
        tied = self.config.tie_word_embeddings and not self.scalar_head
        if tied and self.lm_head.weight is not self.embed_tokens.weight:
            self.lm_head.weight = self.embed_tokens.weight
        tie_adapters(self)

    def _apply(self, fn: Any, recurse: bool = True) -> "Decoder":
        # Leaving the meta device replaces each module's parameters one by one, which would untie them.
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    @property
    def head(self) -> Head:
        return self.score if self.scalar_head else self.lm_head

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """normal(0, initializer_range) for every matrix; norms multiply by 1; zeros for biases, the router's too."""
        for module in self.modules():
            for name, param in module.named_parameters(recurse=False):
                if isinstance(module, RMSNorm):
                    param.fill_(1.0 - module.offset)
                elif name == "bias":
                    param.zero_()
                else:
                    param.normal_(0.0, self.config.initializer_range, generator=generator)
        for moe in self.moe_layers():
            if moe.gate.e_score_correction_bias is not None:
                moe.gate.e_score_correction_bias.zero_()

    def moe_layers(self) -> Iterator[MoE]:
        return (layer.mlp for layer in cast(Iterable[DecoderLayer], self.layers) if isinstance(layer.mlp, MoE))

    def forward(
        self,
        input_ids_T: Tensor,
        cu_seqlens: Tensor,
        *,
        head: HeadFn | None = None,
        cache: tuple[BlockCache, Tensor] | None = None,
        replay_ids_TLK: Tensor | None = None,
        balance_scale: Tensor | None = None,
        with_routing: bool = False,
        shared_S: Tensor | None = None,
    ) -> Any:
        """Run N packed sequences; cu_seqlens [N+1] (int32) says where each begins.

        head: `fn(hidden_TD, weight_VD)`, run inside the head's own forward; default logits_TV.
        cache: where the keys of every token are kept, and its slot (int64 [T]), for decode to go on from; a sequence
            begins with a block, and token p of it is in place p % 16 of one.
        replay_ids_TLK: the experts of each token in each MoE layer, in place of the routers' choice.
        balance_scale: 0-d; this times the balance loss of every layer and sequence is added to what is minimised.
        with_routing: return (result, Routing), or (result, None) without experts.
        shared_S: where sequences begin alike, the input that each token of the sequences is (models/shared_tokens.py).
            Sequences, experts and routing are then those of S tokens, and the head's inputs of T.
        """
        shared = None if shared_S is None else SharedTokens(shared_S, input_ids_T.numel())
        num_tokens = input_ids_T.numel() if shared_S is None else shared_S.numel()
        plan = AttentionPlan(cu_seqlens, num_tokens, input_ids_T.device, shared)
        assert shared is None or cache is None, "a cache has the tokens of each sequence"
        x_TD = self.embed_tokens(input_ids_T)
        ropes = self.rotary(plan.positions_T, plan.lengths_T, x_TD.dtype)
        step = ForwardPass(plan, ropes, cache, balance_scale)
        replayed = iter(() if replay_ids_TLK is None else plan.once(replay_ids_TLK).unbind(1))
        routings: list[Routing | None] = []
        for i, layer in enumerate(self.layers):
            replay_ids_TK = next(replayed, None) if self.config.is_moe_layer(i) else None
            x_TD, routing = layer(x_TD, step, replay_ids_TK)
            routings.append(routing)
        result = self.head(self.norm(x_TD), head)
        return (result, _of_model(routings, plan)) if with_routing else result

    @torch.no_grad()
    def decode(
        self,
        input_ids_B: Tensor,
        positions_B: Tensor,
        cache: BlockCache,
        block_table_BN: Tensor,
        *,
        head: HeadFn | None = None,
        with_routing: bool = False,
    ) -> Any:
        """One token for each row, at its place in a sequence whose earlier tokens are in the cache; returns logits_BV.

        block_table_BN: int32, the blocks of each row's sequence. Rows may be of one sequence: all are written before
        any is read. with_routing: as in forward.
        """
        # `forward` itself, past hooks: FSDP's make its streams wait for this one, which would break a graph's capture.
        x_BD = self.embed_tokens.forward(input_ids_B)
        ropes = self.rotary(positions_B, positions_B + 1, x_BD.dtype)
        step = DecodeStep(positions_B, block_table_BN, ropes, cache)
        routings: list[Routing | None] = []
        for layer in cast(Iterable[DecoderLayer], self.layers):
            x_BD, routing = layer.decode(x_BD, step)
            routings.append(routing)
        result = self.head.forward(self.norm.forward(x_BD), head)
        return (result, _of_model(routings)) if with_routing else result
