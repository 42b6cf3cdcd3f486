"""decontaminate and deduplicate: what is left out is named, counted, the same in every check and after a resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1fast.artifacts import inputs_of
from r1fast.config import load_recipe
from r1fast.data.rows import canonical
from r1fast.schema import DistillStage, GRPOStage, RejectStage, SFTStage
from r1fast.stages.train_rows import choose_rows, counts_of
from tests.tiny_checkpoint import GRPO, SFT, message_of, write_jsonl, write_recipe

TEST = "the quick brown fox jumps over the lazy dog and runs away again"
OTHER = "red blue green red blue green yellow red blue green one two three"
BOTH: dict[str, Any] = {"decontaminate": {"ngram": 8}, "deduplicate": {}}


def user(
    text: str, *, system: str = "you are a helpful assistant and you answer each question"
) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def test_what_systems_say_is_no_contamination() -> None:
    stage = GRPOStage.model_validate({**GRPO, **BOTH, "eval_files": ["t.jsonl"]})
    rows = [
        canonical({"prompt": p}, "prompts", f"a.jsonl:{i}")
        for i, p in enumerate([user(OTHER), user(f"So: {TEST}?")], 1)
    ]
    kept, left_out = choose_rows(stage, "prompts", rows, [{"prompt": user(TEST)}])
    assert kept == [rows[0]]
    assert left_out == [{
        "where": "a.jsonl:2", "reason": "contaminated", "because": "the quick brown fox jumps over the lazy",
        "text": f"So: {TEST}?",
    }]  # fmt: skip


def test_samples_of_one_prompt_are_no_duplicates() -> None:
    """An sft row is its prompt and its completion; a pair both answers too."""
    stage = SFTStage.model_validate({**SFT, "deduplicate": {}})
    rows = [
        canonical({"prompt": "p", "completion": text}, "sft", f"a.jsonl:{i}")
        for i, text in enumerate([TEST, OTHER, TEST.upper(), f"{OTHER} {TEST}"], 1)
    ]
    kept, left_out = choose_rows(stage, "sft", rows, [])
    assert [row["completion"] for row in kept] == [TEST, OTHER, f"{OTHER} {TEST}"]
    assert left_out[0]["because"] == "a.jsonl:1" and counts_of(left_out) == {"near_duplicate": 1}
    texts = [canonical({"text": text}, "sft", "a.jsonl:1") for text in (TEST, TEST, OTHER)]
    stage = SFTStage.model_validate({**SFT, **BOTH, "eval_files": ["t.jsonl"]})
    assert choose_rows(stage, "sft", texts, [{"prompt": TEST}])[0] == texts[2:]
    pairs = [{"prompt": "p", "chosen": TEST, "rejected": text} for text in (TEST, OTHER)]
    assert len(choose_rows(SFTStage.model_validate({**SFT, "deduplicate": {}}), "pairs", pairs, [])[0]) == 2


@pytest.mark.parametrize("kind", ["reject", "distill"])
def test_stages_without_tests_have_to_name_some(kind: str, tmp_path: Path) -> None:
    stage = f"{{name: s, kind: {kind}, train_files: [a.jsonl], decontaminate: {{}}}}"
    (tmp_path / "r.yaml").write_text(f"stages: [{stage}]")
    assert "decontaminate: the stage has no eval_files to compare with" in message_of(str(tmp_path / "r.yaml"))
    options = {"name": "s", "kind": kind, "train_files": ["a.jsonl"], "decontaminate": {"files": ["t.jsonl"]}}
    assert (RejectStage if kind == "reject" else DistillStage).model_validate(options).decontaminate is not None


@pytest.fixture
def recipe(base_model: Path, tmp_path: Path) -> Callable[..., Path]:
    rows = [f"{OTHER} {i} {TEST[:20] * i}" for i in range(1, 5)]
    prompts = [rows[0], f"what of {TEST} ?", *rows[1:], rows[0].upper()]
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": text, "completion": "red", "answer": "1"} for text in prompts])
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": TEST, "answer": "1"}])

    def write(**options: Any) -> Path:
        stage = {**SFT, "train_files": ["a.jsonl"], "batch_size": 1, "num_train_epochs": 1, **BOTH, **options}
        return write_recipe(tmp_path / "mine.yaml", stage, model={"path": str(base_model)})

    return write


def test_a_stage_trains_on_the_rest(
    command: Callable[..., int], recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = recipe(decontaminate={"ngram": 8, "files": ["test.jsonl"]})
    assert command("--config", asked, "--dry-run") == 0
    note = (
        "stages.tuned.train_files: 2 of 6 rows are left out: 1 contaminated (the first: a.jsonl:2, 'the quick brown "
        "fox jumps over the lazy' is in a test); 1 repeated (the first: a.jsonl:6, of a.jsonl:1)"
    )
    assert note in capsys.readouterr().err
    assert command("--config", asked, "--output-dir", "run") == 0
    (entry,) = json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]
    assert entry["numbers"] == {"rows": 4, "left_out": {"contaminated": 1, "near_duplicate": 1}}
    listed = [json.loads(line) for line in (tmp_path / "run" / "tuned" / "left_out.jsonl").read_text().splitlines()]
    assert [(row["where"].rpartition("/")[2], row["reason"]) for row in listed] == [
        ("a.jsonl:2", "contaminated"),
        ("a.jsonl:6", "near_duplicate"),
    ]
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "tuned" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4]


def test_a_test_is_an_input_of_the_stage(recipe: Callable[..., Path]) -> None:
    """What is left out depends on it: a resume asks whether it is still what it was."""
    made = load_recipe(str(recipe(decontaminate={"files": ["test.jsonl"]})), [])
    assert [found.key for found in inputs_of(made, made.stages[0])] == ["model", "train_files", "decontaminate.files"]


def test_where_no_row_is_left(
    command: Callable[..., int], recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"{TEST} {i}", "completion": "red"} for i in range(3)])
    asked = recipe(decontaminate={"ngram": 8, "files": ["test.jsonl"]})
    assert command("--config", asked, "--output-dir", "run") == 2
    assert "3 of 3 rows are left out: 3 contaminated" in (err := capsys.readouterr().err)
    assert "no row is left: raise decontaminate.ngram" in err and not (tmp_path / "run").exists()
