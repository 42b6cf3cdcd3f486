"""Adapters against peft: logits, gradients and files, both ways; what else peft writes is read or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from r1fast.models import folders
from r1fast.models.decoder import Decoder

from r1fast.models.lora import (  # isort: skip
    Factors, LoraConfig, adapted, adapters_off, add_adapters, factors_of, init_adapters, merged, set_noise
)  # fmt: skip
from r1fast.models.lora_files import Export, export_of, save_adapter
from r1fast.models.weights import check_checkpoint, load_model, load_tokenizer
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import SamplingParams
from tests import zoo

SPEC = LoraConfig(r=3, alpha=12)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS_T = torch.randint(0, 64, (17,), generator=torch.Generator().manual_seed(1))
CU_SEQLENS = torch.tensor([0, 17], dtype=torch.int32)
LOSS_TV = torch.randn(17, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
CLOSE: dict[str, float] = {"rtol": 1e-6, "atol": 1e-6}  # fp64; angles and transformers' norms are fp32


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models of transformers by family, made when they are asked for."""
    made: dict[str, Path] = {}

    def of(family: str, **changes: Any) -> Path:
        name = f"{family}{sorted(changes.items())}"
        if name not in made:
            ids = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
            folder = tmp_path_factory.mktemp(family)
            made[name] = zoo.write_oracle(folder, **zoo.fields(family, initializer_range=0.1, **ids, **changes))
        return made[name]

    return of


def with_adapters(base: Path, spec: LoraConfig = SPEC) -> Decoder:
    """In fp64, and so that they do something."""
    decoder, _ = load_model(base, dtype="float64")
    add_adapters(decoder, spec)
    init_adapters(decoder, ((name, 0, tensor) for name, tensor in decoder.state_dict().items()), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for *_, lora in adapted(decoder):
            lora.B.normal_(0, 0.1, generator=generator)
    return decoder.double()


def save(decoder: Decoder, folder: Path, base: str | Path, spec: LoraConfig = SPEC) -> Path:
    save_adapter(folder, export_of(decoder, spec, lambda tensor: tensor.clone()), decoder.config, str(base))
    return folder


def peft_of(base: Path, folder: Path, kind: Any = AutoModelForCausalLM) -> Any:
    model = kind.from_pretrained(base, dtype=torch.float64, experts_implementation="eager")
    return PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=False).double().eval()


def peft_saved(base: Path, folder: Path, **config: Any) -> tuple[Path, Tensor]:
    """An adapter that peft makes and writes, and the logits with it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, experts_implementation="eager")
    model = get_peft_model(model, PeftConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config}))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.normal_(0, 0.1, generator=generator)
    model.double().eval().save_pretrained(folder)
    with torch.no_grad():
        return folder, model(IDS_T[None]).logits[0]


def run(model: Any) -> Tensor:
    return model(IDS_T, CU_SEQLENS) if isinstance(model, Decoder) else model(IDS_T[None]).logits[0]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_ours_is_pefts(bases, family: str, tmp_path: Path) -> None:
    """peft loads what is written; then logits, and the gradient of every factor, are equal."""
    base = bases(family)
    ours = with_adapters(base)
    theirs = peft_of(base, save(ours, tmp_path / "lora", base))
    logits = run(ours), run(theirs)
    torch.testing.assert_close(*logits, **CLOSE)
    for found in logits:
        (found * LOSS_TV).sum().backward()
    assert all(param.grad is None for name, param in ours.named_parameters() if "_lora." not in name)
    gradients = {name: Factors(lora.A.grad, lora.B.grad, 1.0) for name, _, _, lora in adapted(ours)}
    save_adapter(tmp_path / "gradients", Export(gradients, {}, SPEC), ours.config, str(base))
    written = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    expected = {name: param.grad for name, param in theirs.named_parameters() if param.requires_grad}
    assert {name.replace(".default", "") for name in expected} == written.keys()
    for name, gradient in expected.items():
        difference = written[name.replace(".default", "")] - gradient
        assert difference.norm() < 1e-6 * gradient.norm(), name
    # It is read back, and without it there is the base again, to the bit.
    torch.testing.assert_close(run(load_model(tmp_path / "lora", dtype="float64")[0]), logits[0], **CLOSE)
    with adapters_off(ours):
        with adapters_off(ours):
            pass
        assert torch.equal(run(ours), run(load_model(base, dtype="float64")[0]))


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_pefts_is_read(bases, family: str, tmp_path: Path) -> None:
    """all-linear of peft is the router too, twice the rank for gate and up of experts; not the dense layers beside."""
    moe = {"target_parameters": EXPERTS} if "experts" in str(zoo.fields(family)) else {}
    folder, expected = peft_saved(base := bases(family), tmp_path / "lora", target_modules="all-linear", **moe)
    torch.testing.assert_close(run(load_model(folder, dtype="float64")[0]), expected, **CLOSE)
    assert (run(load_model(base, dtype="float64")[0]) - expected).abs().max() > 0.1
    assert check_checkpoint(folder)[0].vocab_size == 64


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "use_rslora": True},
        {
            "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {"o_proj": 5},
            "alpha_pattern": {r"layers.1.*.o_proj": 9},
        },
        {"target_modules": ["lm_head", "down_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "norm"]},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
        {"target_modules": ["v_proj"], "modules_to_save": ["k_proj"]},
        {"target_modules": r".*\.0\.self_attn\.[qk]_proj"},
        {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=[
        "rslora", "patterns", "head", "embedding", "modules-to-save", "layers", "biases", "its-bias", "biased-module",
        "regex", "tied", "tied-and-saved",
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # tied, and not
def test_what_peft_can_write_more(bases, tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    folder, expected = peft_saved(bases(family), tmp_path / "lora", **config)
    torch.testing.assert_close(run(load_model(folder, dtype="float64")[0]), expected, **CLOSE)


def test_pickled_adapters_are_read(bases, tmp_path: Path) -> None:
    folder, expected = peft_saved(bases("llama"), tmp_path / "lora", target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()
    torch.testing.assert_close(run(load_model(folder, dtype="float64")[0]), expected, **CLOSE)


def test_a_reward_model(bases, tmp_path: Path) -> None:
    base = bases("llama")
    decoder, _ = load_model(base, dtype="float64", scalar_head=True)
    add_adapters(decoder, SPEC)
    init_adapters(decoder, ((name, 0, tensor) for name, tensor in decoder.state_dict().items()), seed=0)
    with torch.no_grad():
        decoder.score.weight.normal_()
    decoder.double()
    assert {name for name, p in decoder.named_parameters() if p.requires_grad and "_lora" not in name} == {
        "score.weight"
    }
    folder = save(decoder, tmp_path / "lora", base)
    assert check_checkpoint(folder)[1]
    torch.testing.assert_close(run(load_model(folder, dtype="float64")[0]), run(decoder), **CLOSE)

    def of(*args: Any, **kwargs: Any) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(*args, num_labels=1, pad_token_id=0, **kwargs)

    theirs = peft_of(base, folder, type("Rewards", (), {"from_pretrained": staticmethod(of)}))
    torch.testing.assert_close(theirs(IDS_T[None]).logits[0], run(decoder)[-1], **CLOSE)


@pytest.mark.parametrize("targets", [["o_proj"], ["experts.down_proj"], ["down_proj", "gate_up_proj"], ["gate_proj"]])
def test_some_modules(bases, tmp_path: Path, targets: list[str]) -> None:
    """A dense layer, stacked experts, shared ones: what is named is what has an adapter, here and in peft."""
    base, spec = bases("deepseek_v3"), LoraConfig(r=3, alpha=12, target_modules=tuple(targets))
    ours = with_adapters(base, spec)
    names = {name.removesuffix(".weight").rpartition(".")[2] for name, *_ in adapted(ours)}
    assert names == {target.rpartition(".")[2] for target in targets}
    theirs = peft_of(base, save(ours, tmp_path / "lora", base, spec))
    torch.testing.assert_close(run(ours), run(theirs), **CLOSE)
    numels = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert numels[0] == numels[1]


def test_adapters_on_adapters(bases, tmp_path: Path) -> None:
    """Each names the one before, whose factors are added first."""
    base = bases("qwen3_moe")
    first = save(with_adapters(base), tmp_path / "first", base)
    second = with_adapters(first, LoraConfig(r=2, alpha=4, target_modules=("q_proj", "experts.down_proj")))
    save(second, tmp_path / "second", first, LoraConfig(r=2, alpha=4, target_modules=("q_proj", "experts.down_proj")))
    torch.testing.assert_close(run(load_model(tmp_path / "second", dtype="float64")[0]), run(second), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_generation_reads_merged_weights(bases, family: str, dtype: torch.dtype) -> None:
    model = with_adapters(bases(family)).to(dtype)
    factors = factors_of(model.double(), torch.clone)
    model.to(dtype)
    engine, params = RolloutEngine(model, None), SamplingParams(n=2, max_tokens=6, seed=0, ignore_eos=True)
    with pytest.raises(ValueError, match="would leave out the model's adapters"):
        engine.generate([IDS_T.tolist()], params)
    weights = {name: model.get_parameter(name) for name in factors}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with merged(model):
        (samples,) = engine.generate([IDS_T.tolist()], params)
        most = torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 1)  # fp32: r products are summed
        for name, weight in weights.items():
            a, b, scale = factors[name]
            off = (weight.double() - before[name].double() - Factors(a, b, scale).rows(0, len(b))).abs()
            size = before[name].double().abs() + Factors(a.abs(), b.abs(), scale).rows(0, len(b))
            assert (off / size).max() <= most, name
            weight.data.copy_(before[name])
    for sample in samples:
        ids_T = torch.tensor([*IDS_T.tolist(), *sample.token_ids])
        logits_TV = model(ids_T[:-1], torch.tensor([0, len(ids_T) - 1], dtype=torch.int32)).float()
        logprobs_T = logits_TV.log_softmax(-1).gather(1, ids_T[1:, None])[len(IDS_T) - 1 :, 0]
        limit = 1e-4 if dtype == torch.float32 else 0.15
        torch.testing.assert_close(logprobs_T, torch.tensor(sample.logprobs), rtol=0, atol=limit)


def test_dropout(bases) -> None:
    """In training alone, by a seed; a mask of its own for each weight; the mean over masks is the adapter."""
    model = with_adapters(bases("llama"), LoraConfig(r=3, alpha=12, dropout=0.4))
    plain = run(model.eval())
    model.train()
    found = []
    for seed in (0, 1, 0):
        set_noise(model, seed)
        found.append(run(model))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    with adapters_off(model):
        assert torch.equal(run(model), run(load_model(bases("llama"), dtype="float64")[0]))
    assert not torch.equal(found[0], plain)
    loras = [lora for *_, lora in adapted(model)]
    x, masks = torch.ones(2000, 32, dtype=torch.float64), []
    for lora in loras[:2]:
        dropped = lora._drop(x, lora.dropout, 0, lora._index)
        assert set(dropped.unique().tolist()) == {0.0, 1 / 0.6} and abs(float(dropped.mean()) - 1) < 0.02
        masks.append(dropped)
    assert not torch.equal(*masks)


def test_the_same_mask_when_it_is_computed_again(bases) -> None:
    from r1fast_kernels.torch_private import checkpoint_wrapper

    gradients = []
    for wraps in (False, True):
        model = with_adapters(bases("llama"), LoraConfig(r=3, alpha=12, dropout=0.4)).train()
        for name, layer in list(model.layers.named_children()) if wraps else ():
            setattr(model.layers, name, checkpoint_wrapper(layer, preserve_rng_state=False))
        (run(model) * LOSS_TV).sum().backward()
        gradients.append({name: (lora.A.grad, lora.B.grad) for name, _, _, lora in adapted(model)})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(x, y) for name in gradients[0] for x, y in zip(gradients[0][name], gradients[1][name]))


def test_the_tokenizer_is_that_of_the_base(bases, tmp_path: Path) -> None:
    base = zoo.write_checkpoint(tmp_path / "base")
    folder = save(with_adapters(base), tmp_path / "lora", base)
    assert len(load_tokenizer(folder) or ()) == len(load_tokenizer(base) or ()) > 0
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    assert load_model(folder)[0].config.eos_token_id == [load_model(base)[0].config.eos_token_id, 7]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora=True is more than the two factors of LoRA; merge the adapter"),
    "bias": ({"lora_bias": True}, "lora_bias=True is more"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is more"),
    "alora": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens=.3. is more"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices=.3. is more"),
    "newer": ({"use_something_new": 1}, "use_something_new=1 is more"),
    "no-alpha": ({"lora_alpha": None}, "lora_alpha or alpha_pattern is no number"),
    "no-mapping": ({"alpha_pattern": ["q_proj"]}, "lora_alpha or alpha_pattern is no number"),
    "no-pattern": ({"alpha_pattern": {"(": 3}}, "lora_alpha or alpha_pattern is no number .*unterminated"),
    "ia3": ({"peft_type": "IA3"}, "peft_type is 'IA3', expected LORA"),
    "no-base": ({"base_model_name_or_path": None}, "base_model_name_or_path: None, expected the folder or Hub id"),
    "moved": ({"base_model_name_or_path": "/gone/base"}, "/gone/base: no such folder.*; correct it there"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_settings(bases, tmp_path: Path, name: str) -> None:
    folder = save(with_adapters(bases("llama")), tmp_path / "lora", bases("llama"))
    changes, message = REFUSED[name]
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t | {f"{Q}.lora_magnitude_vector": torch.ones(32)}, "lora_magnitude_vector is no factor of LoRA"),
        (lambda t: t | {f"{Q}.lora_B.bias": torch.ones(32)}, "lora_B.bias is no factor of LoRA"),
        (lambda t: {k: x for k, x in t.items() if k != f"{Q}.lora_B.weight"}, "self_attn.q_proj has no lora_B"),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(3, 33)}, r"adapts model.layers.0.self_attn.q_proj.weight"),
        (lambda t: {k.replace("q_proj", "query"): x for k, x in t.items()}, "self_attn.query.weight .*no such weight"),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.full((3, 32), torch.nan)}, "holds NaN or Inf"),
        (lambda t: {}, "adapter_model.safetensors: holds no tensors; save the adapter again"),
        (lambda t: {k: torch.ones(0) for k in t}, r"lora_A.weight is F32 \(0,\), expected a matrix"),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(3, 0)}, r"lora_A.weight is F32 \(3, 0\), expected a matrix"),
    ],
    ids=["magnitude", "bias", "half", "shape", "name", "nan", "empty", "of-another-rank", "no-columns"],
)  # fmt: skip
def test_refused_tensors(bases, tmp_path: Path, edit: Any, message: str) -> None:
    folder = save(with_adapters(bases("llama")), tmp_path / "lora", bases("llama"))
    file = folder / "adapter_model.safetensors"
    save_file(edit(load_file(file)), file)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_an_adapter_of_a_hub_model_is_checked_without_its_weights(
    bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases("llama")
    asked: list[tuple[str, str | None]] = []

    def fetch(hub_id: str, revision: str | None, **_: Any) -> str:
        asked.append((hub_id, revision))
        return str(base)

    monkeypatch.setattr(folders, "snapshot_download", fetch)
    folder = save(with_adapters(base), tmp_path / "lora", "owner/model@refs/pr/3")
    values = json.loads((folder / "adapter_config.json").read_text())
    assert (values["base_model_name_or_path"], values["revision"]) == ("owner/model", "refs/pr/3")
    check_checkpoint(folder)
    assert set(asked) == {("owner/model", "refs/pr/3")}
    (folder / "adapter_config.json").write_text(json.dumps(values | {"use_dora": True}))
    with pytest.raises(ValueError, match=r"adapter_config.json: use_dora=True is more"):
        check_checkpoint(folder)


def test_where_the_base_is(bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is written as an absolute one, a package by its name; a relative one is, as in peft, of where one is."""
    base, package = bases("llama"), tmp_path / "weights_in_a_wheel"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "base").symlink_to(base)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    expected = run(model := with_adapters(base))
    for given, written in (("weights_in_a_wheel/base", str(base)), *[(r := "package:weights_in_a_wheel/base", r)]):
        folder = save(model, tmp_path / "lora", given)
        file = folder / "adapter_config.json"
        assert json.loads(file.read_text())["base_model_name_or_path"] == written
        torch.testing.assert_close(run(load_model(folder, dtype="float64")[0]), expected, **CLOSE)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "./weights_in_a_wheel/base"}))
    torch.testing.assert_close(run(load_model(folder, dtype="float64")[0]), expected, **CLOSE)
    monkeypatch.chdir("/")
    with pytest.raises(ValueError, match=f"{file}: base_model_name_or_path: ./weights_in_a_wheel/base: no such folder"):
        load_model(folder)


def test_adapters_in_a_circle(bases, tmp_path: Path) -> None:
    folder = save(with_adapters(bases("llama")), tmp_path / "lora", bases("llama"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(folder)}))
    with pytest.raises(ValueError, match="expected the folder or Hub id of its base"):
        load_model(folder)


def test_refused_targets(bases) -> None:
    with pytest.raises(
        ValueError, match=r"target_modules: 'q_prj' is no linear layer of this model; expected some of .*q_proj"
    ):
        with_adapters(bases("llama"), LoraConfig(target_modules=("o_proj", "q_prj")))
    with pytest.raises(ValueError, match=r"dropout: model.layers.1.mlp.experts.gate_up_proj is stacked experts"):
        with_adapters(bases("deepseek_v3"), LoraConfig(dropout=0.1))
    with_adapters(bases("deepseek_v3"), LoraConfig(dropout=0.1, target_modules=("o_proj",)))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
