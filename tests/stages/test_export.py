"""The saved folder alone gives the prompts of training, its stop tokens, and the generation defaults of its source."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from r1fast.data.tokenizer import BOS, train_tokenizer
from r1fast.models.decoder import Decoder
from r1fast.models.model_config import ModelConfig
from r1fast.models.weights import Checkpoint, load_model, save_model
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import SamplingParams
from r1fast.rollout.tokenization import encode_text_prompts, leading_ids
from r1fast.stages.context import exported_tokenizer
from r1fast.stages.packed import encode_examples, encode_prompts
from tests.tiny_checkpoint import DEEPSEEK_V3, GRPO, PROMPTS, QWEN2, TEXTS, write_checkpoint, write_jsonl, write_recipe

QUESTION = "What is {1} + 2 ?\n 'quoted' \"twice\" \\n {{ braces }} 🙂  "
SYSTEM = {"role": "system", "content": "be brief \n"}
TURNS = [
    {"role": "user", "content": "one ?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"},
    {"role": "user", "content": QUESTION},
]
CHATS: dict[str, Any] = {
    "question": QUESTION,
    "bos-in-the-question": f"{BOS}one ?",
    "system": [SYSTEM, TURNS[0]],
    "turns": TURNS,
    "system-turns": [SYSTEM, *TURNS],
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}\n"
)


def make_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """adds-bos as Llama's; has-bos as SmolLM2's, which it never puts itself; no-bos as Qwen's."""
    made = train_tokenizer(TEXTS, 320)
    if kind != "adds-bos":
        made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if kind == "no-bos":
        made.bos_token = None
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="module", params=["adds-bos", "has-bos", "no-bos"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return make_tokenizer(request.param)


def stage_of(
    template: str, response_format: str = "think_summary", prefill: bool = False, **variables: Any
) -> SimpleNamespace:
    return SimpleNamespace(
        name="s", kind="sft", prompt_template=template, response_format=response_format, prefill_think=prefill,
        chat_template_kwargs=variables, today=None,
    )  # fmt: skip


def tiny_decoder(tokenizer: PreTrainedTokenizerBase, **fields: Any) -> Decoder:
    values: dict[str, Any] = {
        "model_type": "llama", "vocab_size": -(-len(tokenizer) // 8) * 8, "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    decoder = Decoder(ModelConfig.from_dict(values | fields))
    decoder.init_weights()
    return decoder


def saved(tokenizer: PreTrainedTokenizerBase, stage: SimpleNamespace, folder: Path, **options: Any) -> Path:
    said: list[str] = []
    exported = exported_tokenizer(SimpleNamespace(stage=stage, message=said.append), tokenizer)  # type: ignore[arg-type]
    assert bool(said) == (stage.prompt_template == "few_shot")
    decoder = tiny_decoder(tokenizer)
    save_model(decoder.config, decoder.state_dict(), folder, exported, **options)
    return folder


def as_messages(prompt: Any) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


@pytest.mark.parametrize("prefill", [None, "think_summary", "think_answer", "special_token"])
@pytest.mark.parametrize("template", ["chat", "r1_zero", "plain", "tokenizer"])
def test_the_folder_renders_the_prompts_of_training(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, template: str, prefill: str | None
) -> None:
    stage = stage_of(template, prefill or "think_answer", prefill is not None)
    loaded = AutoTokenizer.from_pretrained(saved(tokenizer, stage, tmp_path))
    assert (tmp_path / "chat_template.jinja").is_file()  # where transformers and vLLM look for it
    for name, prompt in CHATS.items():
        if isinstance(prompt, list) and template in ("r1_zero", "plain"):
            with pytest.raises(Exception, match="trained on single questions"):
                loaded.apply_chat_template(prompt, add_generation_prompt=True)
            continue
        ((expected, _),) = encode_prompts([{"prompt": prompt}], tokenizer, stage)
        found = loaded.apply_chat_template(as_messages(prompt), add_generation_prompt=True)["input_ids"]
        assert found == expected, name


@pytest.mark.parametrize("prefill", [False, True], ids=["open", "prefilled"])
@pytest.mark.parametrize("template", ["chat", "r1_zero", "plain"])
def test_whole_chats_are_the_examples_of_training(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, template: str, prefill: bool
) -> None:
    """Other trainers render the assistant's turn by the same template."""
    stage = stage_of(template, prefill=prefill)
    loaded = AutoTokenizer.from_pretrained(saved(tokenizer, stage, tmp_path))
    turns = [TURNS[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nthree"}]
    (example,) = encode_examples([{"messages": turns}], tokenizer, stage)
    found = loaded.apply_chat_template(turns)["input_ids"]
    assert loaded.decode(found) == loaded.decode(example.prompt_ids + example.completion_ids)


def test_few_shot_keeps_the_tokenizers_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = saved(tokenizer, stage_of("few_shot"), tmp_path)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template


def test_a_template_that_opens_the_reasoning_is_kept(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    opening = make_tokenizer("adds-bos")
    opening.chat_template = CHATML.removesuffix("{% endif %}\n") + "<think>\n\n{% endif %}"
    folder = saved(opening, stage_of("tokenizer", prefill=True), tmp_path)
    assert AutoTokenizer.from_pretrained(folder).chat_template == opening.chat_template


@pytest.mark.parametrize("prefill", [False, True], ids=["open", "prefilled"])
def test_variables_of_the_training_are_the_defaults_of_the_folder(tmp_path: Path, prefill: bool) -> None:
    made = make_tokenizer("adds-bos")
    made.chat_template = "{% if tone %}[{{ tone }}, {{ words }}]\n{% endif %}" + CHATML
    stage = stage_of("tokenizer", prefill=prefill, tone='calm "1"', words=[True, None, {"most": 2.5}])
    loaded = AutoTokenizer.from_pretrained(saved(made, stage, tmp_path))
    asked = [{"role": "user", "content": "one ?"}]
    (prompt,) = encode_prompts([{"prompt": asked}], made, stage)
    assert made.decode(prompt.ids).startswith("[calm \"1\", [True, None, {'most': 2.5}]]\n<|im_start|>user")
    assert loaded.apply_chat_template(asked, add_generation_prompt=True)["input_ids"] == prompt.ids
    other = loaded.apply_chat_template(asked, add_generation_prompt=True, tone="", tokenize=False)
    assert other.startswith("<|im_start|>user")


@pytest.mark.parametrize("template", ["chat", "r1_zero", "plain"])
def test_text_given_by_hand_is_encoded_as_in_training(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    from r1fast.data.templates import render_prompt

    ((expected, _),) = encode_prompts([{"prompt": "one ?"}], tokenizer, stage_of(template))
    text = render_prompt("one ?", template, tokenizer=tokenizer)
    engine = RolloutEngine(tiny_decoder(tokenizer), tokenizer)
    params = SamplingParams(max_tokens=3)
    assert engine.generate([text], params) == engine.generate([expected], params)
    assert encode_text_prompts([text], tokenizer) == [expected]


def test_what_a_tokenizer_puts_before_a_text() -> None:
    adds, has = make_tokenizer("adds-bos"), make_tokenizer("has-bos")
    assert leading_ids(adds) == [adds.bos_token_id] and leading_ids(has) == []
    ends = make_tokenizer("adds-bos")
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {ends.eos_token}",
        special_tokens=[(BOS, ends.bos_token_id), (ends.eos_token, ends.eos_token_id)],
    )
    assert ends("a").input_ids[-1] == ends.eos_token_id
    assert encode_text_prompts(["a"], ends) == [[ends.bos_token_id, *has("a").input_ids]]  # a prompt does not end


def test_generation_defaults_of_the_source_are_kept(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("no-bos")
    source = saved(tokenizer, stage_of("chat"), tmp_path / "source")
    theirs = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True, "pad_token_id": 7, "eos_token_id": 9}
    (source / "generation_config.json").write_text(json.dumps(theirs | {"_from_model_config": True}))
    decoder, loaded = load_model(source)
    save_model(decoder.config, decoder.state_dict(), tmp_path / "trained", loaded, source=source)
    found = GenerationConfig.from_pretrained(tmp_path / "trained")
    assert {name: getattr(found, name) for name in theirs if name != "eos_token_id"} == {
        name: value for name, value in theirs.items() if name != "eos_token_id"
    }
    assert set(found.eos_token_id) == {9, tokenizer.eos_token_id}  # what training ended answers with is one of them
    again, _ = load_model(tmp_path / "trained")
    assert set(again.config.eos_token_id) == set(found.eos_token_id)


@pytest.fixture
def sft(command: Callable[..., int], tmp_path: Path) -> Callable[..., Path]:
    """Runs one sft stage on a model of two steps of training, and returns the folder of what it made."""

    def run(model: Path, **options: Any) -> Path:
        write_jsonl(tmp_path / "train.jsonl", [{"prompt": "one ?", "completion": "<think>\nhm\n</think>\n\ntwo"}] * 4)
        stage = {"name": "tuned", "kind": "sft", "train_files": ["train.jsonl"], "batch_size": 4, "max_length": 1000}
        recipe = write_recipe(tmp_path / "recipe.yaml", stage | options, model={"path": str(model)})
        assert command("--config", recipe, "--output-dir", "run") == 0
        return tmp_path / "run" / "tuned" / "model"

    return run


@pytest.mark.parametrize("template", ["chat", "r1_zero", "few_shot"])
def test_a_stage_saves_what_it_trained_with(sft: Callable[..., Path], tmp_path: Path, template: str) -> None:
    start = write_checkpoint(tmp_path / "start", **{**QWEN2, "model_type": "llama", "max_position_embeddings": 1024})
    theirs = {"temperature": 0.6, "do_sample": True, "eos_token_id": 5}
    (start / "generation_config.json").write_text(json.dumps(theirs))
    folder = sft(start, prompt_template=template, response_format="think_summary", prefill_think=True)
    loaded = AutoTokenizer.from_pretrained(folder)
    found = loaded.apply_chat_template([TURNS[0]], add_generation_prompt=True)["input_ids"]
    ((expected, prefilled),) = encode_prompts([{"prompt": "one ?"}], loaded, stage_of(template, prefill=True))
    assert prefilled and (found == expected) == (template != "few_shot")
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.temperature == 0.6 and set(generation.eos_token_id) == {5, loaded.eos_token_id}


# ---- logits that are not finite ----


@pytest.mark.parametrize("weight", ["norm.weight", "lm_head.weight"])
def test_generation_refuses_logits_that_are_not_finite(weight: str) -> None:
    tokenizer = make_tokenizer("no-bos")
    decoder = tiny_decoder(tokenizer)
    with torch.no_grad():
        decoder.state_dict()[weight].view(-1)[3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"logits are not finite in 3 of 3 completions"):
        RolloutEngine(decoder, tokenizer).generate(["one"], SamplingParams(n=3, max_tokens=2))


def make_infinite(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Every model, once loaded, holds one infinite value."""
    fill = Checkpoint.fill

    @torch.no_grad()
    def fill_and_spoil(checkpoint: Checkpoint, parts: Iterable[tuple[str, int, torch.Tensor]]) -> None:
        given = {part_name: (part_name, start, part) for part_name, start, part in parts}
        fill(checkpoint, given.values())
        given[name][2].view(-1)[1] = float("inf")

    monkeypatch.setattr(Checkpoint, "fill", fill_and_spoil)


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.mlp.gate.e_score_correction_bias"])
def test_evaluation_refuses_a_model_that_is_not_finite(
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    model = write_checkpoint(tmp_path / "start", **DEEPSEEK_V3)
    make_infinite(monkeypatch, name)
    write_jsonl(tmp_path / "eval.jsonl", PROMPTS)
    how = {"prompt_template": "chat", "max_completion_length": 8}
    stage = {"name": "test", "kind": "evaluate", "eval_files": ["eval.jsonl"], **how}
    recipe = write_recipe(tmp_path / "recipe.yaml", stage, model={"path": str(model)})
    assert command("--config", recipe, "--output-dir", "run") == 1
    assert f"stages.test: the model holds NaN or Inf in {name}, so it is not evaluated" in capsys.readouterr().err


def test_rl_refuses_samples_that_are_not_finite(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_checkpoint(tmp_path / "start")
    make_infinite(monkeypatch, "norm.weight")
    write_jsonl(tmp_path / "train.jsonl", PROMPTS)
    recipe = write_recipe(tmp_path / "recipe.yaml", GRPO, model={"path": str(model)})
    assert command("--config", recipe, "--output-dir", "run") == 1
    assert "stages.zero: the model's logits are not finite in 4 of 4 completions" in capsys.readouterr().err
