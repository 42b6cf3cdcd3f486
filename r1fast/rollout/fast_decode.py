"""What generates in place of the decoder's own modules: decode_layers. On a CPU prefills and steps in one call of C++;
on a GPU steps of few launches (fused_decode.py)."""

import logging
from typing import Any

from torch import Tensor

from r1fast.models.cache import BlockCache
from r1fast.models.decoder import Decoder
from r1fast.models.families import ONE_ROPE, PRE_NORMS
from r1fast.models.layers import HeadFn
from r1fast.models.lora import adapted, is_adapter
from r1fast.models.mla import LATENT_NORM_EPS
from r1fast.models.model_config import ModelConfig
from r1fast.models.moe import Routing
from r1fast.models.rope import softmax_scale
from r1fast.models.structure import differences, unwrapped
from r1fast.rollout.fused_decode import FusedDecode, can_fuse
from r1fast_kernels import dispatch
from r1fast_kernels.decode_layers import MOST_PROMPT_TOKENS, DecodeLayers, weights_of
from r1fast_kernels.dispatch import log_choice

logger = logging.getLogger("r1fast")


def fast_decode(model: Decoder) -> "FastDecode | FusedDecode | None":
    """None, with a line that says why: the modules run. Raises ValueError where they would not compute what `forward`
    does."""
    if any(lora.is_on for *_, lora in adapted(model)):
        raise ValueError(
            "generation would leave out the model's adapters; generate inside lora.merged, or from a merged model"
        )
    if found := differences(model, model.built):
        logger.warning("decode_layers does not run, the modules do: %s", "; ".join(found[:5]))
        return None
    config, on_gpu = model.config, model.embed_tokens.weight.device.type == dispatch.TRITON_DEVICE
    if unknown := unknown_parts(config, on_gpu=on_gpu):
        log_choice("decode_layers", "reference", f"the modules for {', '.join(unknown)}")
        return None
    if on_gpu:
        return FusedDecode(model) if can_fuse(model) else None
    if model.head.in_fp32:
        log_choice("decode_layers", "reference", "the modules for a head in float32")
        return None
    named = [[*layer.named_parameters(), *layer.named_buffers()] for layer in model.layers]
    named = [[(name, tensor) for name, tensor in layer if not is_adapter(name)] for layer in named]
    layers = DecodeLayers(
        embedding_VD=model.embed_tokens.weight,
        weights=weights_of([{unwrapped(name): tensor for name, tensor in layer} for layer in named]),
        norm_D=model.norm.weight,
        head_VD=model.head.weight,
        inv_freq_R=model.rotary.inv_freq,
        rotary_scale=model.rotary.attention_factors[0],
        interleaved=model.rotary.interleaved,
        num_heads=config.num_attention_heads,
        scale=softmax_scale(config),
        eps=config.rms_norm_eps,
        latent_eps=LATENT_NORM_EPS,
        **config.routing,
    )
    return FastDecode(model, layers) if layers.can_run() else None


# What decode_layers has on a GPU and not on a CPU.
TRITON_HAS = (
    "a scaled embedding", "more than one rotary embedding, or layers without", "frequencies that the length chooses",
    "windows", "a gate of the shared expert",
)  # fmt: skip


def unknown_parts(config: ModelConfig, *, on_gpu: bool = False) -> list[str]:
    """What families may be built of (models/families.py) and decode_layers has not, of this one."""
    family, layers = config.family, [config.layer(i) for i in range(config.num_hidden_layers)]
    found = {
        "norms after attention and MLP": family.norms != PRE_NORMS,
        "norms that add to their weight": family.norm_offset != 0,
        "norms of whole projections": family.qk_norm == "projection",
        "another activation than SiLU": family.activation != "silu",
        "a scaled embedding": family.scales_embedding,
        "more than one rotary embedding, or layers without": any(layer.rope != ONE_ROPE for layer in layers),
        "frequencies that the length chooses": any(r["rope_type"] == "longrope" for r in config.ropes.values()),
        "partly rotated heads": not config.uses_mla and config.rope_dim < config.attention_head_dim,
        "windows": any(layer.window for layer in layers),
        "soft caps": config.attn_logit_softcapping is not None,
        "a gate of the shared expert": family.shared_gate and config.has_router,
    }
    return [part for part, holds in found.items() if holds and not (on_gpu and part in TRITON_HAS)]


class FastDecode:
    """Called as the decoder is, by what generates: with its weights of now, which must not move meanwhile."""

    def __init__(self, model: Decoder, layers: DecodeLayers) -> None:
        self.model, self.layers = model, layers

    def __call__(
        self,
        input_ids_T: Tensor,
        cu_seqlens: Tensor,
        *,
        cache: tuple[BlockCache, Tensor],
        head: HeadFn | None = None,
        with_routing: bool = False,
    ) -> Any:
        if int(cu_seqlens.diff().max()) > MOST_PROMPT_TOKENS:
            return self.model(input_ids_T, cu_seqlens, cache=cache, head=head, with_routing=with_routing)
        hidden_TD, experts_LTK = self.layers.prefill(input_ids_T, cu_seqlens, cache[0].buffers, cache[1])
        # Past hooks, as in Decoder.decode: of norm and head, one FSDP unit, the head alone would leave it gathered.
        result = self.model.head.forward(hidden_TD, head)
        return (result, _routing(experts_LTK)) if with_routing else result

    def decode(
        self,
        input_ids_B: Tensor,
        positions_B: Tensor,
        cache: BlockCache,
        block_table_BN: Tensor,
        *,
        with_routing: bool = False,
    ) -> Any:
        """Rows of different sequences: one is through all layers before another begins."""
        logits_BV, experts_LBK = self.layers(input_ids_B, positions_B, cache.buffers, block_table_BN)
        return (logits_BV, _routing(experts_LBK)) if with_routing else logits_BV


def _routing(experts_LTK: Tensor) -> Routing | None:
    return Routing(experts_LTK.transpose(0, 1), None) if len(experts_LTK) else None
