"""Each family against transformers in fp32: logits, gradients, greedy decoding; and packing, prefill and decode."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from r1fast.models.cache import BlockCache
from r1fast.models.decoder import Decoder
from r1fast.models.layers import RMSNorm
from r1fast.models.model_config import ModelConfig
from r1fast.models.weights import to_hf_names
from r1fast_kernels.decode_attention import BLOCK, slots_of

Pack = Callable[[list[Tensor]], tuple[Tensor, Tensor]]


def assert_near(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    scale = expected.abs().max().clamp(min=1e-3)
    assert (got - expected).abs().max() <= tolerance * scale, f"{(got - expected).abs().max() / scale=}"


def oracle_logits(model: torch.nn.Module, documents: list[Tensor]) -> Tensor:
    return torch.cat([model(document[None]).logits[0] for document in documents])


def test_logits(checkpoint, documents: list[Tensor], pack: Pack) -> None:
    with torch.no_grad():
        assert_near(checkpoint.load()(*pack(documents)), oracle_logits(checkpoint.oracle, documents))


def test_a_soft_cap_that_one_layer_forgets_is_noticed(make_checkpoint, documents: list[Tensor], pack: Pack) -> None:
    checkpoint = make_checkpoint("gemma2")
    decoder = checkpoint.load()
    decoder.layers[1].self_attn.soft_cap = None
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_near(decoder(*pack(documents)), oracle_logits(checkpoint.oracle, documents))


def test_gradient_of_every_parameter(checkpoint, documents: list[Tensor], pack: Pack) -> None:
    decoder, targets = checkpoint.load(), torch.cat(documents).roll(-1)
    loss = F.cross_entropy(decoder(*pack(documents)), targets)
    loss.backward()
    checkpoint.oracle.zero_grad()
    expected_loss = F.cross_entropy(oracle_logits(checkpoint.oracle, documents), targets)
    expected_loss.backward()
    assert_near(loss.detach(), expected_loss.detach())
    tied = decoder.config.tie_word_embeddings
    grads = to_hf_names({name: param.grad for name, param in decoder.named_parameters()}, decoder.config, tied=tied)
    expected = {name.removeprefix("model."): param.grad for name, param in checkpoint.oracle.named_parameters()}
    expected = to_hf_names(expected, decoder.config, tied=tied)  # the oracle stacks its experts in memory too
    assert grads.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in grads.items():
        tolerance = 2e-5 * max(expected[name].abs().max(), 1e-2 * largest)
        assert (grad - expected[name]).abs().max() <= tolerance, name


def test_greedy_equals_generate(checkpoint, documents: list[Tensor], pack: Pack) -> None:
    """Three steps would do for the cache; twelve cross the length of the shortest document."""
    decoder, steps = checkpoint.load(), 12
    kwargs = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [checkpoint.oracle.generate(doc[None], **kwargs)[0, len(doc) :] for doc in documents]
    assert greedy(decoder, documents, pack, steps).tolist() == torch.stack(expected).tolist()


def room_for(decoder: Decoder, documents: list[Tensor], steps: int) -> tuple[BlockCache, Tensor, Tensor, Tensor]:
    """A cache, the scattered blocks of each document, where the tokens of all go, and their number."""
    lengths = torch.tensor([len(document) for document in documents])
    width = -(-(int(lengths.max()) + steps) // BLOCK)
    table = torch.randperm(len(documents) * width, generator=torch.Generator().manual_seed(0)).view(-1, width).int()
    slots = [slots_of(row[None], length)[0] for row, length in zip(table, lengths.tolist(), strict=True)]
    cache = BlockCache(decoder.config, table.numel(), decoder.embed_tokens.weight.dtype, "cpu")
    return cache, table, torch.cat(slots), lengths


def greedy(decoder: Decoder, documents: list[Tensor], pack: Pack, steps: int) -> Tensor:
    cache, table, slots, lengths = room_for(decoder, documents, steps)
    last = lengths.cumsum(0) - 1
    with torch.no_grad():
        logits = decoder(*pack(documents), head=lambda hidden, weight: hidden[last] @ weight.T, cache=(cache, slots))
    out = [logits.argmax(-1)]
    for step in range(steps - 1):
        out.append(decoder.decode(out[-1], lengths + step, cache, table).argmax(-1))
    return torch.stack(out, dim=1)


def test_prefill_and_decode_equal_full_forward(checkpoint, documents: list[Tensor], pack: Pack) -> None:
    decoder = checkpoint.load()
    full = [torch.cat((document, document[:5].repeat(5)[:5])) for document in documents]
    with torch.no_grad():
        expected = [decoder(*pack([document])) for document in full]
    cache, table, slots, lengths = room_for(decoder, documents, 5)
    with torch.no_grad():
        decoder(*pack(documents), cache=(cache, slots))
    for step in range(5):
        inputs = torch.stack([document[len(document) - 5 + step] for document in full])
        logits = decoder.decode(inputs, lengths + step, cache, table)
        assert_near(logits, torch.stack([rows[len(rows) - 5 + step] for rows in expected]))
    # A document's new tokens at once, as neighbours: each sees those before it.
    inputs, table_5N = full[0][-5:], table[:1].expand(5, -1)
    places = torch.arange(len(full[0]) - 5, len(full[0]))
    assert_near(decoder.decode(inputs, places, cache, table_5N), expected[0][-5:])


def test_packed_equals_one_by_one(checkpoint, documents: list[Tensor], pack: Pack) -> None:
    decoder = checkpoint.load()
    with torch.no_grad():
        alone = torch.cat([decoder(*pack([document])) for document in documents])
        assert_near(decoder(*pack(documents)), alone)
        reversed_logits = decoder(*pack(documents[::-1])).split([len(document) for document in documents[::-1]])
        assert_near(torch.cat(reversed_logits[::-1]), alone)


def test_documents_do_not_see_each_other(checkpoint, documents: list[Tensor], pack: Pack) -> None:
    decoder = checkpoint.load()
    changed = [documents[0].flip(0), *documents[1:]]
    with torch.no_grad():
        before, after = decoder(*pack(documents)), decoder(*pack(changed))
    first = len(documents[0])
    assert not torch.equal(before[:first], after[:first])
    if decoder.config.n_routed_experts:
        # Other rows per expert may take another matrix kernel: equal up to rounding, and no more than that.
        assert_near(after[first:], before[first:], 2e-6)
    else:
        assert torch.equal(after[first:], before[first:])


def test_rows_may_share_blocks(checkpoint, documents: list[Tensor], pack: Pack) -> None:
    """Samples of a prompt hold its full blocks together and go on in a copy of the last one."""
    decoder, document = checkpoint.load(), documents[0].repeat(3)[: BLOCK + 5]
    cache, table, slots, _ = room_for(decoder, [document] * 2, 3)
    with torch.no_grad():
        decoder(*pack([document]), cache=(cache, slots[: len(document)]))
        cache.copy_blocks(table[0, 1:2].long(), table[1, 1:2].long())
        table[1, 0] = table[0, 0]
        tokens, place = torch.tensor([5, 9]), torch.tensor([len(document)] * 2)
        logits = decoder.decode(tokens, place, cache, table)
        expected = [decoder(*pack([torch.cat((document, token[None]))]))[-1] for token in tokens]
    assert_near(logits, torch.stack(expected))


def test_head_function_gets_hidden_and_weight(checkpoint, documents: list[Tensor], pack: Pack) -> None:
    decoder = checkpoint.load()
    with torch.no_grad():
        hidden, weight = decoder(*pack(documents), head=lambda hidden, weight: (hidden, weight))
        assert weight is decoder.lm_head.weight
        assert torch.equal(hidden @ weight.T, decoder(*pack(documents)))


def test_meta_construction_then_init(checkpoint, documents: list[Tensor], pack: Pack) -> None:
    config = checkpoint.load().config
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to_empty(device="cpu")
    decoder.init_weights(torch.Generator().manual_seed(3))
    other = Decoder(config)
    other.init_weights(torch.Generator().manual_seed(3))
    assert decoder.state_dict().keys() == other.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(decoder(*pack(documents)), other(*pack(documents)))
    assert (decoder.lm_head.weight is decoder.embed_tokens.weight) == config.tie_word_embeddings


def test_cast_keeps_router_bias_and_frequencies_in_fp32(make_checkpoint) -> None:
    decoder = make_checkpoint("deepseek_v3").load()
    bias = next(decoder.moe_layers()).gate.e_score_correction_bias.clone()
    frequencies = decoder.rotary.inv_freq.clone()
    decoder.to(torch.bfloat16)
    assert decoder.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(next(decoder.moe_layers()).gate.e_score_correction_bias, bias)
    assert torch.equal(decoder.rotary.inv_freq, frequencies)


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma3_text", "llama", "olmo2", "phi3", "qwen2_moe", "qwen3_moe"])
def test_bf16_stays_near_fp32(make_checkpoint, name: str, documents: list[Tensor], pack: Pack) -> None:
    """Dtypes fit together in bf16, decoding included; the bound is loose, bf16 has 8 bits."""
    decoder = make_checkpoint(name).load()
    with torch.no_grad():
        expected = decoder(*pack(documents[:1]))
        decoder.to(torch.bfloat16)
        cache, table, slots, lengths = room_for(decoder, documents[:1], 1)
        logits = decoder(*pack(documents[:1]), cache=(cache, slots))
        step = decoder.decode(torch.tensor([5]), lengths, cache, table)
    assert logits.dtype == step.dtype == torch.bfloat16
    assert (logits - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_norms_add_to_their_weight_in_fp32() -> None:
    """As Gemma's: in bf16 1 + w has 8 bits, and the error of the result would be 1.4 times as large."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator).bfloat16() for size in ((64, 96), (96,)))
    ours, theirs = RMSNorm(96, 1e-6, offset=1.0).bfloat16(), Gemma3RMSNorm(96).bfloat16()
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight / 8)
    with torch.no_grad():
        scale = 1 + ours.weight.double()
        want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
        errors = [(norm(x).double() - want).abs().mean() for norm in (ours, theirs)]
    assert errors[0] <= 1.1 * errors[1]


def test_wrong_cu_seqlens_is_an_error(make_checkpoint) -> None:
    decoder = make_checkpoint("qwen2-tied").load()
    with pytest.raises(ValueError, match=r"cu_seqlens.*expected \[N\+1\] rising from 0 to the 4 packed tokens"):
        decoder(torch.tensor([1, 2, 3, 4]), torch.tensor([0, 3], dtype=torch.int32))


def test_scalar_head_has_no_vocabulary_head() -> None:
    config = ModelConfig.from_dict(
        {"model_type": "qwen2", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 2, "tie_word_embeddings": True}
    )  # fmt: skip
    decoder = Decoder(config, scalar_head=True)
    decoder.init_weights()
    assert decoder(torch.arange(5), torch.tensor([0, 5])).shape == (5, 1)
    assert "lm_head.weight" not in decoder.state_dict()
