"""Files as they are published: fp8 with scales, multi-token prediction, pickles, heads of reward models, revisions."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from r1fast.models import folders, tensor_files
from r1fast.models.weights import Checkpoint, check_checkpoint, load_model
from tests import zoo

IDS, CU_SEQLENS = torch.tensor([5, 6, 7, 60, 3, 9, 11]), torch.tensor([0, 7], dtype=torch.int32)
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    """Change the tensors of a folder, and return them."""
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return stored


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# ---- fp8 ----


def quantize(stored: dict[str, Tensor]) -> None:
    """As the release of DeepSeek-V3: every projection, but not the router, embeddings and head."""
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        weight = stored[name]
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 128, 0, -weight.shape[0] % 128))
        blocks = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).transpose(1, 2)
        scale = blocks.abs().amax((2, 3)).clamp(min=1e-6) / 448
        quantized = (blocks / scale[:, :, None, None]).transpose(1, 2).flatten(2).flatten(0, 1)
        stored[name] = quantized[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn).contiguous()
        stored[f"{name}_scale_inv"] = scale


def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """weight_dequant of DeepSeek's inference/kernel.py, element by element."""
    rows, columns = torch.arange(weight.shape[0]) // 128, torch.arange(weight.shape[1]) // 128
    return weight.float() * scale[rows][:, columns]


@pytest.fixture
def fp8(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """Widths past one block and not whole ones; tensors by transformers' name."""
    sizes = {"hidden_size": 144, "intermediate_size": 272, "moe_intermediate_size": 136, "num_attention_heads": 2}
    folder = zoo.write_checkpoint(tmp_path / "model", **zoo.fields("deepseek_v3", **sizes))
    edit_config(folder, quantization_config=FP8)
    stored = edit(folder, quantize)
    names = [name for name in stored if not name.endswith("_scale_inv")]
    scales = {name: stored.get(f"{name}_scale_inv") for name in names}
    return folder, {
        name: stored[name] if (scale := scales[name]) is None else dequantized(stored[name], scale) for name in names
    }


def in_model(state: dict[str, Tensor], name: str) -> Tensor:
    """A tensor of the decoder by transformers' name."""
    parts = name.removeprefix("model.").split(".")
    if "experts" not in parts:
        return state[".".join(parts)]
    place = parts.index("experts")
    proj, prefix = parts[place + 2], ".".join(parts[: place + 1])
    if proj == "down_proj":
        return state[f"{prefix}.down_proj"][int(parts[place + 1])]
    return state[f"{prefix}.gate_up_proj"][int(parts[place + 1])].chunk(2)[proj == "up_proj"]


@pytest.mark.parametrize("chunk_bytes", [600, 1 << 20], ids=["rows", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_is_dequantized(fp8, dtype: torch.dtype, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, expected = fp8
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", chunk_bytes)
    state = load_model(folder, dtype=dtype)[0].state_dict()
    assert len(expected) > 30
    for name, tensor in expected.items():
        wanted = tensor if "e_score" in name else tensor.to(dtype)
        assert torch.equal(in_model(state, name), wanted), name
    assert check_checkpoint(folder)[0].num_hidden_layers == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_scales_may_be_small(fp8, dtype: torch.dtype) -> None:
    folder, _ = fp8
    name = "layers.0.mlp.down_proj.weight"

    def shrink(stored: dict[str, Tensor]) -> None:
        stored.update({name: scale.to(dtype) for name, scale in stored.items() if name.endswith("_scale_inv")})

    stored = edit(folder, shrink)
    expected = dequantized(stored[f"model.{name}"], stored[f"model.{name}_scale_inv"].float())
    assert torch.equal(load_model(folder, dtype="float32")[0].state_dict()[name], expected)
    edit(folder, lambda stored: stored.update({f"model.{name}_scale_inv": torch.ones(2, 3, dtype=torch.int32)}))
    with pytest.raises(ValueError, match=rf"model.safetensors: model.{name}_scale_inv has dtype I32, expected one of"):
        load_model(folder)


def test_any_rows_of_fp8_are_those_of_the_whole(fp8) -> None:
    """Parts begin and end inside of blocks, as those of ranks do."""
    folder, _ = fp8
    whole = load_model(folder, dtype="float32")[0].state_dict()
    for name in ("layers.0.mlp.down_proj.weight", "layers.1.mlp.experts.gate_up_proj"):
        for first, last in ((0, 1), (1, 4), (100, 130), (127, 144), (128, 129)):
            part = torch.full_like(whole[name][first:last], float("nan"))
            Checkpoint(folder).fill([(name, first, part)])
            assert torch.equal(part, whole[name][first:last]), (name, first, last)


def test_fp8_that_is_not_whole_is_refused(fp8) -> None:
    folder, _ = fp8
    name = "model.layers.0.mlp.down_proj.weight"
    stored = edit(folder, lambda stored: stored.update({f"{name}_scale_inv": torch.ones(2, 2)}))
    with pytest.raises(ValueError, match=rf"{name}_scale_inv has shape \(2, 2\), expected \(2, 3\) for blocks of"):
        load_model(folder)
    edit(folder, lambda stored: stored.pop(f"{name}_scale_inv"))
    with pytest.raises(ValueError, match=rf"{name} has dtype F8_E4M3, .* with its scale_inv"):
        load_model(folder)
    stored[f"{name}_scale_inv"] = torch.full((2, 3), float("inf"))
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model.safetensors: {name} holds NaN or Inf"):
        load_model(folder)


# ---- what is left out ----


def test_multi_token_prediction_is_left_out_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = zoo.write_checkpoint(tmp_path / "model", **zoo.fields("deepseek_v3"))
    more = {"eh_proj.weight": torch.ones(2), "mlp.experts.0.up_proj.weight": torch.ones(3, 2)}
    edit(folder, lambda stored: stored.update({f"model.layers.2.{name}": t for name, t in more.items()}))
    with caplog.at_level(logging.WARNING, "r1fast"):
        load_model(folder)
    (line,) = caplog.messages
    assert f"{folder}: left out 2 tensors of multi-token prediction" in line


# ---- PyTorch's own files ----


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_pytorch_files(tmp_path: Path, family: str, shards: int) -> None:
    folder = zoo.write_checkpoint(tmp_path / "model", **zoo.fields(family))
    expected = load_model(folder)[0].state_dict()
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"pytorch_model-{i}.bin" for i in range(shards)] if shards > 1 else ["pytorch_model.bin"]
    weight_map = {name: names[i % shards] for i, name in enumerate(stored)}
    for file in names:
        torch.save({name: stored[name] for name in stored if weight_map[name] == file}, folder / file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = load_model(folder)[0].state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    check_checkpoint(folder)


def test_the_hub_is_asked_for_pickles_where_there_is_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = zoo.write_checkpoint(tmp_path / "model", **zoo.fields("qwen2"))
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    asked: list[str] = []

    def fetch(hub_id: str, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns[0])
        if allow_patterns[0] == "pytorch_model*.bin":
            (tmp_path / "pytorch_model.bin").rename(folder / "pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr(folders, "snapshot_download", fetch)
    load_model("owner/model")
    assert asked == ["*.safetensors", "pytorch_model*.bin"]


# ---- reward models ----


def reward_model(folder: Path, head: dict[str, Tensor], **config: Any) -> Path:
    zoo.write_checkpoint(folder, **zoo.fields("llama"))
    edit(folder, lambda stored: (stored.pop("lm_head.weight"), stored.update(head)))
    edit_config(folder, **config)
    return folder


ARCHITECTURES = ["LlamaForSequenceClassification", "LLMForSequenceRegression", "LlamaForCausalLM"]


@pytest.mark.parametrize("name", ["score.weight", "score.0.weight", "value_head.weight", "v_head.summary.weight"])
@pytest.mark.parametrize(
    "architecture", ["LlamaForSequenceClassification", "LLMForSequenceRegression", "LlamaForCausalLM"]
)
def test_heads_of_reward_models(tmp_path: Path, name: str, architecture: str) -> None:
    weight = torch.linspace(-1, 1, 32)[None]
    folder = reward_model(tmp_path / "model", {name: weight}, architectures=[architecture])
    model, _ = load_model(folder)
    assert model.scalar_head and torch.equal(model.score.weight, weight)
    assert check_checkpoint(folder)[1]
    with pytest.raises(ValueError, match="is a reward model"):
        load_model(folder, scalar_head=False)


def test_a_head_beside_that_of_the_language_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As TRL's AutoModelForCausalLMWithValueHead is saved."""
    head = {"v_head.summary.weight": torch.ones(1, 32), "lm_head.weight": torch.ones(312, 32)}
    folder = reward_model(tmp_path / "model", head)
    with caplog.at_level(logging.WARNING, "r1fast"):
        assert load_model(folder)[0].scalar_head
    assert "left out lm_head.weight" in caplog.text


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            {"score.weight": (1, 32), "score.bias": (1,)},
            r"has a bias \(score.bias\), expected one matrix",
        ),
        (
            {"v_head.summary.weight": (1, 32), "v_head.summary.bias": (1,)},
            r"has a bias \(v_head.summary.bias\), expected one matrix .*; call it from a reward function",
        ),
        (
            {"score.0.weight": (32, 32), "score.0.bias": (32,), "score.2.weight": (1, 32), "score.2.bias": (1,)},
            r"has several layers \(score.0.bias, score.2.bias, score.2.weight\), expected one matrix",
        ),
        ({"score.weight": (2, 32)}, r"score.weight has shape \(2, 32\), expected \(1, 32\) of a reward model"),
        ({"value_head.weight": (2, 32)}, r"value_head.weight has shape \(2, 32\), expected \(1, 32\) of a reward"),
        ({"regression_head.weight": (1, 32)}, r"missing score.weight; unexpected reg.*_head.weight; a reward"),
        ({"score.weight": (1, 32), "value_head.weight": (1, 32)}, r"value_head.weight is score.weight of .* once more"),
    ],
    ids=["bias", "value-bias", "two-layers", "labels", "values", "another-name", "two"],
)
def test_heads_that_are_another_function_are_refused(tmp_path: Path, head: dict, message: str) -> None:
    weights = {name: torch.ones(shape) for name, shape in head.items()}
    folder = reward_model(tmp_path / "model", weights, architectures=["LlamaForSequenceClassification"])
    for read in (load_model, check_checkpoint):
        with pytest.raises(ValueError, match=f"{folder}.*: .*{message}"):
            read(folder)


def test_rewards_that_are_shifted_are_refused(tmp_path: Path) -> None:
    """As OpenRLHF writes them: the mean that it saw counts where normalize_reward is true."""
    head = {"value_head.weight": torch.ones(1, 32)}
    settings = {"normalize_reward": False, "value_head_prefix": "value_head", "mean": 0.5, "std": 2.0, "num_labels": 1}
    folder = reward_model(tmp_path / "model", head, architectures=["LLMForSequenceRegression"], **settings)
    assert load_model(folder)[0].scalar_head
    edit_config(folder, normalize_reward=True)
    with pytest.raises(ValueError, match=r"config.json: model config: normalize_reward=True, expected false"):
        load_model(folder)


# ---- revisions ----


def test_a_revision_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = zoo.write_checkpoint(tmp_path / "model", **zoo.fields("qwen2"))
    asked: list[tuple[str, str | None]] = []

    def fetch(hub_id: str, revision: str | None, **_: Any) -> str:
        asked.append((hub_id, revision))
        return str(folder)

    monkeypatch.setattr(folders, "snapshot_download", fetch)
    load_model("owner/model", revision="v1")
    check_checkpoint("owner/model@abc")
    load_model("owner/model")
    assert set(asked) == {("owner/model", "v1"), ("owner/model", "abc"), ("owner/model", None)}


def test_a_branch_may_have_a_slash(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def fetch(hub_id: str, revision: str | None, **_: Any) -> str:
        asked.append(revision)
        raise OSError

    monkeypatch.setattr(folders, "snapshot_download", fetch)
    with pytest.raises(ValueError, match=r"owner/model@refs/pr/3: neither a folder nor a Hub repository"):
        load_model("owner/model", revision="refs/pr/3")
    assert asked == ["refs/pr/3"]


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    folder = zoo.write_checkpoint(tmp_path / "model", **zoo.fields("qwen2"))
    with pytest.raises(ValueError, match=f"{folder} is here and has no revisions"):
        load_model(folder, revision="main")
