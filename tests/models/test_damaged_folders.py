"""Checkpoint folders with tied heads that are two, weights that are not finite, and damaged or hostile files.

Each is loaded as transformers does, or refused in one line that names the file.
"""

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from r1fast.models import folders
from r1fast.models.weights import check_checkpoint, load_model, load_tokenizer, save_model
from tests.tiny_checkpoint import DEEPSEEK_V3, write_checkpoint

IDS = torch.tensor([5, 6, 7, 60, 3, 9, 11])
CU_SEQLENS = torch.tensor([0, len(IDS)], dtype=torch.int32)
Store = Callable[[dict[str, Tensor]], Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sound"))  # qwen2, tied


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "model")


def edit_weights(folder: Path, edit: Store) -> None:
    stored = load_file(folder / "model.safetensors")
    edit(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | values))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_model(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


# ---- tied heads ----


def two_heads(stored: dict[str, Tensor]) -> None:
    stored["lm_head.weight"] = torch.randn_like(stored["model.embed_tokens.weight"])


def equal_heads(stored: dict[str, Tensor]) -> None:
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()


def head_alone(stored: dict[str, Tensor]) -> None:
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")


def test_a_head_alone_serves_a_new_reward_model(folder: Path) -> None:
    edit_weights(folder, head_alone)
    assert torch.equal(
        load_model(folder, scalar_head=True)[0].embed_tokens.weight, load_model(folder)[0].lm_head.weight
    )


@pytest.mark.parametrize(("edit", "tied"), [(two_heads, False), (equal_heads, True), (head_alone, True)])
def test_tied_heads_are_what_transformers_makes_of_them(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, edit: Store, tied: bool
) -> None:
    edit_weights(folder, edit)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with caplog.at_level(logging.WARNING, "r1fast"):
        decoder, _ = load_model(folder)
    assert ("not tied" in caplog.text) != tied
    assert (decoder.lm_head.weight is decoder.embed_tokens.weight) == decoder.config.tie_word_embeddings == tied
    check_checkpoint(folder)
    save_model(decoder.config, decoder.state_dict(), tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        expected_TV = theirs(IDS[None]).logits[0]
        torch.testing.assert_close(decoder(IDS, CU_SEQLENS), expected_TV)
        torch.testing.assert_close(again(IDS[None]).logits[0], expected_TV)
        assert torch.equal(load_model(tmp_path / "saved")[0](IDS, CU_SEQLENS), decoder(IDS, CU_SEQLENS))


def test_a_head_that_is_not_there_is_named(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=False)
    refused(folder, r"missing lm_head\.weight")


# ---- weights ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"])
def test_weights_that_are_not_finite(tmp_path: Path, name: str, value: float) -> None:
    folder = write_checkpoint(tmp_path / "model", **DEEPSEEK_V3)
    load_model(folder)
    edit_weights(folder, lambda stored: stored[name].view(-1)[1].fill_(value))
    refused(folder, rf"model\.safetensors: {name} holds NaN or Inf")


def test_large_weights_are_finite(folder: Path) -> None:
    """Their sum is not."""

    def large(stored: dict[str, Tensor]) -> None:
        stored["model.norm.weight"] = torch.full_like(stored["model.norm.weight"], 60000, dtype=torch.float16)

    edit_weights(folder, large)
    assert load_model(folder)[0].norm.weight.max() == 60000


def test_weights_of_another_kind(folder: Path) -> None:
    def integers(stored: dict[str, Tensor]) -> None:
        stored["model.norm.weight"] = stored["model.norm.weight"].to(torch.int8)

    edit_weights(folder, integers)
    refused(folder, r"model\.norm\.weight has dtype I8, expected one of F64, F32, F16, BF16")


def test_integer_dtype_is_none_for_weights(folder: Path) -> None:
    edit_json(folder / "config.json", dtype="int8", torch_dtype="int8")
    refused(folder, "config.json: dtype='int8', expected a torch.dtype, its name")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("no json", "index.json: not valid JSON"),
        ("[1]", "index.json: is a JSON list, expected an object"),
        ("{}", "index.json: no weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "no weight_map of tensor names to files of this folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "no weight_map of tensor names to files of this folder"),
        ('{"weight_map": {"a": 3}}', "no weight_map"),
        ('{"weight_map": {"a": "model-1.safetensors"}}', "no model-1.safetensors"),
    ],
    ids=["broken", "list", "empty", "outside", "absolute", "number", "absent"],
)
def test_damaged_index(folder: Path, index: str, message: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, message)


def test_a_tensor_in_two_files(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-1.safetensors")
    (folder / "model.safetensors").rename(folder / "model-2.safetensors")
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused(folder, r"model-2.safetensors: .* is .* once more")


def test_an_expert_of_any_number(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", **DEEPSEEK_V3)
    name = "model.layers.1.mlp.experts.{}.up_proj.weight"
    edit_weights(folder, lambda stored: stored.update({name.format(10**12): stored.pop(name.format(0))}))
    refused(folder, r"missing model\.layers\.1\.mlp\.experts\.0\.up_proj\.weight")


class Opens:
    """Unpickling it opens a file for writing."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def test_pickles_hold_tensors_alone(folder: Path, tmp_path: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(stored | {"extra": Opens(tmp_path / "opened")}, folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin: not a readable file of tensors \(it holds more\); convert it")
    assert not (tmp_path / "opened").exists()
    torch.save(stored | {"extra": [1]}, folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin: is no mapping of names to tensors")
    torch.save(stored, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refused(folder, r"pytorch_model\.bin: not a readable file of tensors \(mmap can only be used with .*safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"cut off")
    refused(folder, r"pytorch_model\.bin: not a readable file of tensors")


# ---- text files ----


@pytest.mark.parametrize("text", ["no json", "[]", "3", "", '{"a":' * 100_000, '{"a": 1', "\udcff"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_damaged_json(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, errors="surrogateescape")
    refused(folder, name if name != "tokenizer.json" else "the tokenizer of .* cannot be read")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("config.json", {"hidden_size": 4.57}, "config.json: .*hidden_size.* expected int, got float"),
        ("config.json", {"hidden_size": "32"}, "config.json: .*hidden_size"),
        ("config.json", {"model_type": ["qwen2"]}, "config.json: model_type is"),
        ("config.json", {"architectures": 3}, "config.json: architectures is 3, expected a list of names"),
        ("config.json", {"rms_norm_eps": float("nan")}, "config.json: .*rms_norm_eps=nan, expected a number above 0"),
        ("config.json", {"rope_scaling": [1]}, "config.json: "),
        ("config.json", {"quantization_config": 4}, "config.json: quantization_config .4. cannot be read"),
        ("generation_config.json", {"eos_token_id": [1, "2"]}, r"generation_config.json: eos_token_id is \[1, '2'\]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_of_a_wrong_type(folder: Path, name: str, values: dict[str, Any], message: str) -> None:
    edit_json(folder / name, **values)
    refused(folder, message)


def test_no_code_of_a_folder_is_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anybody asked whether it should be."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on stdin"))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n"
    (folder / "own.py").write_text(code)
    edit_json(folder / "config.json", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    load_model(folder)
    (folder / "tokenizer.json").unlink()
    edit_json(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="OwnTokenizer"
    )
    with pytest.raises(ValueError, match=r"the tokenizer of .* needs code of its own \(OwnTokenizer\), and none"):
        load_tokenizer(folder)
    edit_json(folder / "tokenizer_config.json", auto_map=None)
    edit_json(folder / "config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    with pytest.raises(ValueError, match=r"the tokenizer of .*"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_the_hub_is_asked_for_every_part_of_a_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnmatch import fnmatch

    asked: list[list[str]] = []

    def fetch(hub_id: str, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(folders, "snapshot_download", fetch)
    load_model("owner/model")
    load_tokenizer("owner/model")
    assert len(asked) >= 2
    parts = [
        "chat_template.jinja", "additional_chat_templates/tools.jinja", "tokenizer.json", "tokenizer_config.json",
        "tokenizer.model", "merges.txt", "vocab.json", "special_tokens_map.json", "added_tokens.json",
    ]  # fmt: skip
    for patterns in asked:
        assert [part for part in parts if not any(fnmatch(part, pattern) for pattern in patterns)] == []
    everything = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors"]
    assert all(any(fnmatch(part, pattern) for pattern in asked[0]) for part in everything)
    assert not any(fnmatch("pytorch_model.bin", pattern) for patterns in asked for pattern in patterns)


@pytest.mark.slow
def test_random_damage(sound: Path, tmp_path: Path) -> None:
    """A ValueError of one line, or nothing."""
    rng = random.Random(0)
    for _ in range(1000):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        file = rng.choice([file for file in sorted(folder.iterdir()) if file.is_file()])
        data = bytearray(file.read_bytes())
        for _ in range(rng.choice([1, 3])):
            data[rng.randrange(min(len(data), 4000))] = rng.randrange(256)
        file.write_bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        for read in (check_checkpoint, load_model, load_tokenizer):
            try:
                read(folder)
            except ValueError as error:
                assert "\n" not in str(error) and str(folder) in str(error), file.name  # noqa: PT017
