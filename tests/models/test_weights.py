"""Checkpoints: both directions with transformers, shards, reward models, and errors that name path and key."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from r1fast.models import export, folders, weights
from r1fast.models.decoder import Decoder
from r1fast.models.weights import check_checkpoint, load_model, save_model

IDS = torch.tensor([5, 6, 7, 60, 3, 9, 11])
CU_SEQLENS = torch.tensor([0, len(IDS)], dtype=torch.int32)


def logits_of(decoder: Decoder) -> Tensor:
    with torch.no_grad():
        return decoder(IDS, CU_SEQLENS)


def test_saved_model_loads_in_transformers(checkpoint, tmp_path: Path) -> None:
    decoder = checkpoint.load()
    save_model(decoder.config, decoder.state_dict(), tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.eos_token_id == 2
    with torch.no_grad():
        # Equal weights at other addresses: a product with one column (a shared expert's gate) may round otherwise.
        torch.testing.assert_close(loaded(IDS[None]).logits, checkpoint.oracle(IDS[None]).logits)
    for name, tensor in checkpoint.oracle.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_same_keys_on_disk_as_transformers(checkpoint, tmp_path: Path) -> None:
    decoder = checkpoint.load()
    save_model(decoder.config, decoder.state_dict(), tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(checkpoint.folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2-tied"])
def test_shards_in_both_directions(make_checkpoint, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(name)
    expected = logits_of(checkpoint.load())
    checkpoint.oracle.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    decoder, _ = load_model(tmp_path / "theirs")
    assert torch.equal(logits_of(decoder), expected)

    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 20_000)
    save_model(decoder.config, decoder.state_dict(), tmp_path / "ours")
    shards = list((tmp_path / "ours").glob("*.safetensors"))
    assert len(shards) > 2 and max(file.stat().st_size for file in shards) < 40_000
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(again.state_dict()[key], t) for key, t in checkpoint.oracle.state_dict().items())
    assert torch.equal(logits_of(load_model(tmp_path / "ours")[0]), expected)


@pytest.mark.parametrize("name", ["deepseek_v3-plain-q-tied", "phi3"])
def test_a_checkpoint_in_blocks(make_checkpoint, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row once, a tied head not again; none is larger than a chunk, or a row of a stack."""
    checkpoint = make_checkpoint(name)
    expected = checkpoint.load().state_dict()
    monkeypatch.setattr(weights, "CHUNK_BYTES", 2000)
    found: dict[str, list[torch.Tensor]] = {}
    for name, start, rows in weights.Checkpoint(checkpoint.folder).blocks("float32"):
        parts = found.setdefault(name, [])
        assert start == sum(map(len, parts)) and (rows.nbytes <= 2000 or len(rows) == 1)
        parts.append(rows)
    assert expected.keys() - found.keys() <= {"lm_head.weight"}
    assert all(torch.equal(torch.cat(parts), expected[name]) for name, parts in found.items())
    assert sum(map(len, found.values())) > len(found)


def test_reward_model_round_trip(checkpoint, tmp_path: Path) -> None:
    decoder, _ = load_model(checkpoint.folder, scalar_head=True)
    assert torch.equal(logits_of(decoder), torch.zeros(len(IDS), 1))
    with torch.no_grad():
        decoder.score.weight.copy_(torch.linspace(-1, 1, decoder.config.hidden_size)[None])
    save_model(decoder.config, decoder.state_dict(), tmp_path, scalar_head=True)
    if checkpoint.name == "olmoe":  # transformers has no class for it
        assert torch.equal(logits_of(load_model(tmp_path)[0]), logits_of(decoder))
        return
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.num_labels == 1
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0]
    assert torch.allclose(logits_of(decoder)[-1], expected, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again, _ = load_model(tmp_path / "theirs")
    assert again.scalar_head
    state = decoder.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    # Equal weights at other addresses: a product with one column may round otherwise there.
    torch.testing.assert_close(logits_of(again), logits_of(decoder))


def test_dtype_by_name_and_router_bias_in_fp32(make_checkpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("deepseek_v3")
    decoder, _ = load_model(checkpoint.folder, dtype="bfloat16")
    dtypes = {name: tensor.dtype for name, tensor in decoder.state_dict().items()}
    assert {dtype for name, dtype in dtypes.items() if "bias" not in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if "e_score_correction_bias" in name} == {torch.float32}
    save_model(decoder.config, decoder.state_dict(), tmp_path)
    assert load_model(tmp_path)[0].lm_head.weight.dtype == torch.bfloat16
    assert load_model(tmp_path, dtype="float32")[0].lm_head.weight.dtype == torch.float32


def test_frequencies_survive_loading(make_checkpoint) -> None:
    decoder = make_checkpoint("llama").load()
    assert torch.equal(decoder.rotary.inv_freq, Decoder(decoder.config).rotary.inv_freq)
    assert not any(tensor.is_meta for tensor in [*decoder.parameters(), *decoder.buffers()])


def test_layers_past_the_last_are_left_out_where_they_are_multi_token_prediction(make_checkpoint, tmp_path) -> None:
    for name in ("deepseek_v3", "llama"):
        checkpoint, folder = make_checkpoint(name), tmp_path / name
        shutil.copytree(checkpoint.folder, folder)
        stored = load_file(folder / "model.safetensors")
        stored["model.layers.3.eh_proj.weight"] = torch.ones(2)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    names = load_model(tmp_path / "deepseek_v3")[0].state_dict().keys()
    assert names == make_checkpoint("deepseek_v3").load().state_dict().keys()
    with pytest.raises(ValueError, match=r"unexpected model\.layers\.3\.eh_proj\.weight"):
        load_model(tmp_path / "llama")


@pytest.mark.parametrize("name", ["qwen2-tied", "deepseek_v3"])
def test_tokenizer_travels_unchanged(make_checkpoint, tmp_path: Path, name: str) -> None:
    """Its own splitting survives in every family: AutoTokenizer gives Qwen2 checkpoints Qwen2's."""
    decoder, tokenizer = load_model(make_checkpoint(name).folder)
    assert tokenizer is None
    backend = Tokenizer(models.BPE(vocab={"a": 0, "1": 1, "2": 2, "12": 3}, merges=[("1", "2")]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,3}|."), "isolated")
    save_model(decoder.config, decoder.state_dict(), tmp_path, PreTrainedTokenizerFast(tokenizer_object=backend))
    loaded = load_model(tmp_path)[1]
    assert loaded("a12")["input_ids"] == [0, 3]
    assert len(loaded) == 4


def test_sound_checkpoints_pass_the_check(checkpoint, tmp_path: Path) -> None:
    check_checkpoint(checkpoint.folder)
    decoder, _ = load_model(checkpoint.folder, scalar_head=True)
    save_model(decoder.config, decoder.state_dict(), tmp_path, scalar_head=True)
    check_checkpoint(str(tmp_path))


def damaged(folder: Path, tmp_path: Path, **config: object) -> Path:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | config))
    return tmp_path


@pytest.mark.parametrize(
    "key",
    ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.experts.4.up_proj.weight", "model.embed_tokens.weight"],
)
def test_missing_key(make_checkpoint, tmp_path: Path, key: str) -> None:
    folder = damaged(make_checkpoint("deepseek_v3").folder, tmp_path)
    stored = load_file(folder / "model.safetensors")
    del stored[key]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (load_model, check_checkpoint):
        with pytest.raises(ValueError, match=f"{folder}: missing {key}"):
            load(folder)


def test_unexpected_key_and_wrong_shape(make_checkpoint, tmp_path: Path) -> None:
    folder = damaged(make_checkpoint("llama").folder, tmp_path)
    stored = load_file(folder / "model.safetensors")
    save_file(stored | {"model.extra.weight": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{folder}: unexpected model.extra.weight"):
        load_model(folder)
    save_file(stored | {"model.norm.weight": torch.ones(5)}, folder / "model.safetensors")
    for load in (load_model, check_checkpoint):
        with pytest.raises(ValueError, match=rf"{folder}/.*: model.norm.weight has shape \(5,\), expected \(32,\)"):
            load(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "config.json: model_type is 'gpt2', expected one of deepseek_v2, deepseek_v3"),
        ({"hidden_act": "gelu"}, "config.json: model config: hidden_act='gelu', expected silu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config .fp8. cannot be read"),
    ],
    ids=["unknown-model-type", "unsupported-activation", "quantized"],
)
def test_unsupported_config(make_checkpoint, tmp_path: Path, config: dict[str, object], message: str) -> None:
    folder = damaged(make_checkpoint("llama").folder, tmp_path, **config)
    with pytest.raises(ValueError, match=f"{folder}.*{message}"):
        load_model(folder)


def test_folders_that_are_no_checkpoint(make_checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/nowhere: no such folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{tmp_path}: no config.json; expected a Hugging Face checkpoint folder$"):
        load_model(tmp_path)
    folder = damaged(make_checkpoint("llama").folder, tmp_path)
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "model").symlink_to(folder)
    with pytest.raises(ValueError, match=f"no config.json; .*; {tmp_path}/stage/model holds one"):
        load_model(tmp_path / "stage")
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable safetensors file"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{folder}: no model.safetensors"):
        load_model(folder)


def test_unreachable_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr(folders, "snapshot_download", offline)
    with pytest.raises(ValueError, match="owner/model: neither a folder nor a Hub repository"):
        load_model("owner/model")
    with pytest.raises(ValueError, match="owner/model: neither"):
        check_checkpoint("owner/model")


def test_hub_check_fetches_the_config_only(make_checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def fetch(hub_id: str, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        return str(make_checkpoint("llama").folder)

    monkeypatch.setattr(folders, "snapshot_download", fetch)
    check_checkpoint("owner/model")
    assert asked == [["config.json", "adapter_config.json"]]


def test_bad_dtype(make_checkpoint) -> None:
    with pytest.raises(ValueError, match="dtype='bf17', expected"):
        load_model(make_checkpoint("llama").folder, dtype="bf17")


def test_nothing_is_overwritten_unasked(make_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_checkpoint("llama").load()
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 20_000)
    save_model(decoder.config, decoder.state_dict(), tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"{tmp_path}: already holds .* overwrite=True"):
        save_model(decoder.config, decoder.state_dict(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    save_model(decoder.config, decoder.state_dict(), tmp_path, overwrite=True)
    assert [file.name for file in tmp_path.glob("*safetensors*")] == ["model.safetensors"]  # no stale shards
    load_model(tmp_path)


def test_eos_ids_of_the_generation_config_count(make_checkpoint, tmp_path: Path) -> None:
    """Chat models end a turn with a token that only generation_config.json knows."""
    folder = shutil.copytree(make_checkpoint("qwen2-tied").folder, tmp_path / "chat")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [7, 2, 9]}))
    assert load_model(folder)[0].config.eos_token_id == [2, 7, 9]
    file.write_text(json.dumps({"eos_token_id": None}))
    assert load_model(folder)[0].config.eos_token_id == 2
    file.unlink()
    assert load_model(folder)[0].config.eos_token_id == 2
