"""What evaluations say: by their own names, with intervals, and beside their likes alone."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from r1fast.observe import scores
from r1fast.observe.charts import chain, score_chart, ticks
from r1fast.observe.progress import ChainProgress
from r1fast.observe.run_files import StageData
from r1fast.observe.scores import Score, first_of_step, group_scores, metrics_of, outcome, said
from r1fast.observe.table import print_summary, score_tables

ONE: dict[str, Any] = {
    "pass@1": 0.5, "pass@1_ci": 0.1, "pass@k": 0.7, "greedy": 0.6, "mine": 0.25, "greedy/mine": 0.3, "n": 8, "k": 4,
    "split": "a.jsonl", "temperature": 1.0, "failures": 0, "unscorable": 0, "length": 12.0,
}  # fmt: skip


def test_no_metric_of_a_recipe_is_known_here() -> None:
    names = "accuracy|format|language|helpful|harmless|completeness|repetition|reasoning_gym|tiny|r1"
    files = [path for path in Path(scores.__file__).parent.iterdir() if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert re.findall(rf"""["'/`]({names})["'/`]""", path.read_text(encoding="utf-8")) == [], path.name


def test_metrics_go_by_their_names_and_intervals_are_none() -> None:
    assert metrics_of([ONE]) == ["pass@1", "greedy", "pass@k", "mine", "greedy/mine"]
    assert said(ONE) == ["pass@1 50.0 ± 10.0  greedy 60.0  pass@k 70.0  mine 25.0  greedy/mine 30.0"]
    two = {**ONE, "files": {"a.jsonl": {"pass@1": 0.5}, "b.jsonl": {"turns": 3.25}}}
    assert said(two) == ["a.jsonl: pass@1 50.0", "b.jsonl: turns 3.25"]


@pytest.mark.parametrize(
    "other",
    [{"split": "b.jsonl"}, {"k": 16}, {"temperature": 0.6}, {"top_p": 0.95}, {"prompt_template": "r1_zero"},
     {"limit": 64}, {"chat_template_kwargs": {"enable_thinking": True}},
     {"max_completion_length": 64}, {"prefill_think": True}],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_what_was_measured_otherwise_is_another_group(other: dict[str, Any]) -> None:
    groups = group_scores([("base", ONE), ("zero", {**ONE, **other}), ("r1", ONE)])
    assert [list(group.rows) for group in groups] == [["base", "r1"], ["zero"]]
    assert groups[0].files + groups[0].how != groups[1].files + groups[1].how  # the labels say it


def test_a_file_is_compared_with_itself() -> None:
    both = {**ONE, "split": "a.jsonl,b.jsonl", "files": {"a.jsonl": {"pass@1": 0.9}, "b.jsonl": {"polite": 0.1}}}
    groups = {group.files: group for group in group_scores([("base", ONE), ("r1", both)])}
    assert list(groups["a.jsonl"].scores("pass@1")) == ["base", "r1"] and list(groups["b.jsonl"].rows) == ["r1"]
    limited = group_scores([("base", {**ONE, "limit": 8}), ("r1", {**both, "limit": 8})])
    assert len(limited) == 3  # other rows of a.jsonl: the limit is of both files


def test_answer_forms_are_said_where_they_differ() -> None:
    forms = [("base", {**ONE, "response_format": "think_answer"}), ("r1", {**ONE, "response_format": "special_token"})]
    (group,) = group_scores(forms)
    assert group.formats == "think_answer: base; special_token: r1"


def test_intervals_end_where_shares_do() -> None:
    assert Score(0.98, 0.05).bounds == pytest.approx((0.93, 1.0))
    assert Score(3.0, 0.5).bounds == (2.5, 3.5) and Score(0.5).bounds == (0.5, 0.5)
    difference = Score(0.8, 0.03).minus(Score(0.5, 0.04))
    assert difference == pytest.approx((0.3, 0.05)) and Score(1.0).minus(Score(0.5, 0.1)).half is None


def test_axes_fit_the_values_with_their_intervals() -> None:
    chart = score_chart("pass@1", [("a", "c1", Score(0.91, 0.01)), ("b", "c1", Score(0.93, 0.02))], True)
    assert [label for _, label in chart.ticks] == ["90", "92", "94", "96"]
    assert all(0 <= mark.low <= mark.at <= mark.high <= 100 for row in chart.rows for mark in row.marks)
    assert (chart.rows[0].text, chart.rows[0].note) == ("91.0", "± 1.0")
    assert [label for _, label in score_chart("pass@1", [("a", "c1", Score(0.0, 0.0))], True).ticks] == ["0", "100"]


def test_labels_of_an_axis_do_not_meet() -> None:
    """Ticks are there without; the shortest axis has 66 pixels."""
    for values, labels in (((-3.2, 1.2e8), ["-50M", "", "50M", "", "150M"]), ((2.0, 1e299), ["0", "", "1e299"]),
                           ((0.0, 3.0), ["0", "1", "2", "3"])):  # fmt: skip
        chart = score_chart("turns", [(str(value), "c1", Score(value)) for value in values], False)
        assert [label for _, label in chart.ticks] == labels


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (0.3, 0.3), (-2.0, 7.0), (1e-9, 3e-9), (0, 1.6e10)])
def test_ticks_hold_all(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 3 <= len(found) <= 6


def test_what_stages_without_scores_came_to() -> None:
    assert outcome({"kept": 816, "dropped": {"incorrect": 84, "duplicate": 2300}}) == ["kept 816 of 3,200 (25.5%)"]
    measured = {"held_out_accuracy": 0.912, "held_out_accuracy_ci": 0.055, "held_out_rows": 100}
    assert outcome(measured) == ["held-out accuracy 91.2 ± 5.5%"]
    assert outcome({"parameters": 5}) == []


def test_first_metrics_of_a_step() -> None:
    names = ["loss", "mine", "sampling/x", "rewards/b/mean", "reward", "grad_norm", "kl", "step_time"]
    assert first_of_step(names) == ["reward", "rewards/b/mean", "loss", "mine", "kl", "grad_norm"]


def test_tables_are_cut_to_the_room() -> None:
    many = {f"reward_{i:02d}": 0.5 for i in range(30)}
    (group,) = group_scores([("zero", {**ONE, **many})])
    tables = list(score_tables(group, 100))
    headings = [str(column.header) for table in tables for column in table.columns if column.header != "model"]
    assert len(tables) > 2 and headings == [f"{metric} %" for metric in group.metrics]


def test_the_printed_summary(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    stages = [
        {
            "name": "zero",
            "kind": "grpo",
            "status": "done",
            "seconds": 33.0,
            "eval_after": {**ONE, "failures": 3, "unscorable": 1},
        },
        {"name": "rej", "kind": "reject", "status": "done", "numbers": {"kept": 4, "dropped": {"incorrect": 6}}},
        {"name": "r1", "kind": "grpo", "status": "running"},
    ]
    print_summary({"recipe": "mine", "seconds": 34.0, "stages": stages}, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("kept 4 of 10 (40.0%)", "r1 running", "3 samples with a failed", "1 prompt without", "50.0 ± 10.0",
                 "greedy/mine %", "a.jsonl: 8 prompts, 4 samples each, temperature 1", "total 34.0 s"):  # fmt: skip
        assert part in text
    print_summary({}, Console(file=io.StringIO()))


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """rich would take [brackets] for a style, and :train: for a picture."""
    odd = {"pass@1": 0.5, "my[/x]": 2.0, "split": "[bold]org/name:train:7"}
    print_summary({"recipe": "[/y]", "stages": [{"name": "zero", "kind": "grpo", "status": "done", "eval_after": odd}]})
    with ChainProgress(["zero"]) as progress:
        progress.message("org/name:train: 3 rows [red]")
        progress.finish_stage("zero", evaluation=odd)
    out, err = capsys.readouterr()
    assert all(part in out for part in ("my[/x]", "[bold]org/name:train:7", "[/y]"))
    assert err.splitlines() == ["org/name:train: 3 rows [red]", "✓ zero  done  pass@1 50.0  my[/x] 2"]


def test_rails_of_the_chain() -> None:
    """Neighbours are joined straight; a source that others need later has a rail, in a lane where none is."""
    stages = [StageData(name=name, model=model, inputs=list(inputs), kind=kind) for name, model, inputs, kind in (
        ("base", None, "", "pretrain"), ("zero", "base", "", "grpo"), ("cold", "zero", "", "collect"),
        ("dev", "base", ["cold"], "sft"), ("end", "base", "", "grpo"), ("last", "dev", "", "grpo"),
    )]  # fmt: skip
    drawn = chain(stages)
    shapes = [sorted(piece.shape for piece in row) for row in drawn.rows]
    assert shapes == [["down", "out"], ["down", "up", "via"], ["down", "up", "via"], ["out", "tee", "up", "via"],
                      ["in", "via"], ["in"]]  # fmt: skip
    assert [piece.is_rows for piece in drawn.rows[2] if piece.shape == "down"] == [True]
    lefts = {piece.left for row in drawn.rows for piece in row if piece.shape in ("out", "via")}
    assert len(lefts) == 2 and max(lefts) < drawn.x
