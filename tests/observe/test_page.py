"""The page: self-contained, escaped, and made from whatever a run left behind."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from r1fast.observe.page import LONGEST_TEXT, build_report, clipped
from r1fast.report import main


class Page(HTMLParser):
    """A page as a reader has it: every tag closed in order, its text, its links, the JSON of its charts."""

    def __init__(self, place: Path) -> None:
        """place: a run, whose page is made, or a page."""
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.data: Any = None
        path = build_report(place) if place.is_dir() else place
        assert path in (place, place / "report.html")
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == [], "unclosed tags"
        assert "url(http" not in self.source and "@import" not in self.source
        assert len(self.ids) == len(set(self.ids))
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "input"):
            self.open.append(tag)
        attributes = {name: value or "" for name, value in attrs}
        assert not attributes.keys() & {"src", "srcset", "onload"}
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)
        elif self.open[-1:] == ["script"] and self.data is None:
            self.data = json.loads(data)


def change(run_dir: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    edit(summary)
    path.write_text(json.dumps(summary))
    return run_dir


def test_whole_chain(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    page = Page(write_run(tmp_path))
    assert "This run is not complete" not in page.text and "reloads itself" not in page.text
    for expected in (
        "pass@1 77.6 % ± 4.1 r1, 8.1% in base", "11 of 11 stages done",
        "Scores: report.jsonl 400 prompts, 4 samples each, temperature 1, template chat; with 95% intervals",
        "pass@1 % 8.1 ± 2.7 79.1 ± 4.0 +71.0 ± 4.8", "greedy/format % 72.3 ± 4.4", "mean length, tokens 10.8 20.8",
        "from base with cold", "kept 1,637 of 5,600 (29.2%)", "held-out accuracy 91.2 ± 5.5%",
        "rewards/accuracy/mean", "mixed language 1,311 23%", "generate 15.9 s 24%", "MB",
        "Load of experts, by layer step 1 step 60", "The resolved recipe", "zero: 24 from 3 of 3 logged steps",
    ):  # fmt: skip
        assert expected in page.text


def test_charts_have_the_runs_numbers(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    data = Page(write_run(tmp_path)).data
    stages = {stage["name"]: stage for stage in data["stages"]}
    points = {name: stages[name]["curves"]["loss"][0]["points"] for name in ("zero", "base")}
    assert [step for step, _ in points["zero"]] == list(range(1, 61))
    assert len(points["base"]) == 600 and (points["base"][0][0], points["base"][-1][0]) == (1, 600)
    assert [(len(table), len(table[0])) for table in stages["zero"]["load"]] == [(2, 8), (2, 8)]


def test_completions_have_prompt_gold_and_the_parts_of_their_reward(
    tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    samples = Page(write_run(tmp_path)).data["samples"]
    assert {sample["stage"] for sample in samples} == {"zero", "dev2", "dev2_no_language", "r1"}
    first = next(sample for sample in samples if sample["step"] == 60)
    assert first["prompt"].startswith("A conversation") and first["gold"] == "47" and "</answer>" in first["completion"]
    assert first["parts"].keys() == {"accuracy", "format", "language"} and {"reward", "advantage"} <= first.keys()


def test_long_texts_lose_their_middle() -> None:
    text = clipped("begin" + "x" * (LONGEST_TEXT + 995) + "end")
    assert text.startswith("begin") and text.endswith("end") and "1,003 characters" in text
    assert clipped([{"role": "user"}]) == '[{"role": "user"}]'


def test_evaluations_under_way_are_curves_with_intervals(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    """Those before and after the stage belong to them if they were measured alike."""

    def edit(summary: dict[str, Any]) -> None:
        zero = summary["stages"][1]
        zero["validations"] = [zero["eval_after"] | {"step": step, "pass@1": step / 100} for step in (20, 40)]

    run = change(write_run(tmp_path), edit)
    zero = Page(run).data["stages"][1]["curves"]
    curve = zero["eval/pass@1"][0]
    assert curve["points"] == [[0, 0.081], [20, 0.2], [40, 0.4], [60, 0.791]]
    assert curve["bounds"][-1] == pytest.approx([0.751, 0.831], abs=1e-3)
    assert "eval/greedy/format" in zero
    change(run, lambda run: [one.update(limit=64) for one in run["stages"][1]["validations"]])
    assert len(Page(run).data["stages"][1]["curves"]["eval/pass@1"][0]["points"]) == 2


def test_scores_of_other_settings_stand_apart(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    def edit(summary: dict[str, Any]) -> None:
        zero, dev1, r1 = (summary["stages"][i]["eval_after"] for i in (1, 3, 9))
        zero |= {"temperature": 0.6, "top_p": 0.95}
        dev1["k"] = 16
        parts = {name: dict(r1) for name in ("report.jsonl", "chat.jsonl")}
        parts["chat.jsonl"] = {"polite": 0.75, "polite_ci": 0.1, "turns": 3.2}
        r1 |= {"split": "report.jsonl,chat.jsonl", "files": parts}

    page = Page(change(write_run(tmp_path), edit))
    for expected in (
        "Scores: report.jsonl 400 prompts, 4 samples each, temperature 0.6, top_p 0.95, template chat",
        "Scores: report.jsonl 400 prompts, 16 samples each, temperature 1, template chat",
        "Scores: chat.jsonl 4 samples each, temperature 1, template chat",
        "polite % r1 75.0 ± 10.0", "turns r1 3.2",  # a mean above 1 is no share
    ):  # fmt: skip
        assert expected in page.text


def test_the_page_of_a_run_at_work_says_so_and_reloads(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path, stop_in="dev2")
    source = build_report(run, live=True).read_text()
    assert '<html lang="en" data-reload="60" data-written="' in source and "This run is at work" in source
    assert "data-reload" not in build_report(run).read_text()


def test_a_student_alone_stands_against_the_model_from_outside(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    """As in recipe distill; of two students of one model the first may have left out what it starts from."""

    def edit(summary: dict[str, Any]) -> None:
        student = summary["stages"][-1]
        summary["stages"] = [student | {"name": "unmeasured", "eval_before": {}, "eval_after": {}}, student]

    page = Page(change(write_run(tmp_path), edit))
    assert "pass@1 50.6 % ± 4.9 student, 4.9% in Qwen2.5-0.5B" in page.text


def test_text_of_the_run_is_escaped(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    hostile = "</script><script>alert(1)</script><svg onload=x>\udce9"

    def edit(summary: dict[str, Any]) -> None:
        summary["recipe"] = summary["stages"][1]["model"] = hostile
        summary["stages"][1]["numbers"] = {hostile: hostile}
        summary["stages"][0]["status"] = hostile

    run = change(write_run(tmp_path), edit)
    with (run / "zero" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 61, hostile: 1.0}) + "\n")
    page = Page(run)
    assert "alert(1)" in page.text and "<script>alert" not in page.source and "<svg onload" not in page.source
    assert hostile in page.data["stages"][1]["curves"]
    assert "<b>so" not in page.source  # from a completion


def test_stopped_run_says_where(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    page = Page(write_run(tmp_path, stop_in="dev2"))
    assert "4 of 11 stages are done. Stage dev2 was running at step 20 of 40 when this page was made." in page.text
    assert "stage-dev2" in page.ids and "stage-dev3" not in page.ids
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)


@pytest.mark.parametrize("missing", ["summary.json", "config.yaml", "zero/metrics.jsonl", "zero/samples"])
def test_missing_parts(missing: str, tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path)
    path = run / missing
    for file in path.iterdir() if path.is_dir() else [path]:
        file.unlink()
    assert {"stage-zero", "stage-dev1"} <= set(Page(run).ids)


def test_files_cut_short_by_a_kill(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path)
    (run / "summary.json").write_text('{"stages": [{"na')
    (run / "zero" / "stage.json").write_text('{"entry"')
    (run / "config.yaml").write_text("stages: [")
    sample = run / "zero" / "samples" / "step_00060.parquet"
    sample.write_bytes(sample.read_bytes()[:100])
    with (run / "zero" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "rew')
    page = Page(run)
    assert "Stage zero stopped at step 60." in page.text and "77.6 ± 4.1" in page.text  # of r1, from its stage.json
    assert "79.1" not in page.text and "zero: 16 from 2 of 3 logged steps" in page.text


@pytest.mark.parametrize(("name", "content"), [
    ("config.yaml", "[" * 3000), ("summary.json", ""), ("summary.json", "[]"), ("summary.json", '{"stages": 3}'),
    ("summary.json", "[" * 100_000), ("summary.json", '{"stages": [{"name": "zero", "eval_after": [1]}]}'),
    ("summary.json", '{"stages": [{"name": "zero", "numbers": {"a": NaN, "kept": 1e999, "b": [{}]}, "seconds": NaN}]}'),
    ("summary.json", '{"stages": [{"name": "zero", "inputs": ["dev1"]}, {"name": "dev1", "inputs": ["zero"]}]}'),
    ("zero/metrics.jsonl", '{"step": 1, "moe/load": 3}'), ("zero/metrics.jsonl", '{"step": 1, "moe/load": [[]]}'),
    ("zero/metrics.jsonl", '{"step": 1, "moe/load": [[1, null], ["x"]]}'), ("zero/metrics.jsonl", "[" * 100_000),
    ("zero/metrics.jsonl", '{"step": 2, "loss": 1e308}\n{"step": 3, "loss": -1e299}\n{"step": 1, "loss": NaN}'),
    ("zero/metrics.jsonl", '{"step": 1, "loss": 1' + "0" * 400 + "}"),
])  # fmt: skip
def test_damaged_files_make_a_page(name: str, content: str, tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path)
    (run / name).write_text(content)
    assert main([str(run)]) == 0
    assert Page(run).data["stages"]


def test_a_directory_without_a_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="give the --output-dir of a run that has started"):
        build_report(tmp_path)
    with pytest.raises(ValueError, match="which is no directory"):
        build_report(tmp_path / "none")
    assert main([str(tmp_path)]) == 2
    assert "no summary.json" in capsys.readouterr().err


def test_command_prints_scores_and_path(
    tmp_path: Path, write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_run(tmp_path))]) == 0
    printed = capsys.readouterr().out
    assert "pass@1 %" in printed and "dev2_no_language" in printed and printed.rstrip().endswith("report.html")


def test_every_reward_and_the_failures_stand_with_the_scores(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    more = {"mine": 0.25, "failures": 3, "unscorable": 2}
    page = Page(change(write_run(tmp_path), lambda run: run["stages"][1]["eval_after"].update(more)))
    assert "language % 53.0 ± 4.9 55.0 ± 4.9 +2.0 ± 6.9 mine % – 25.0" in page.text
    assert "zero: 3 samples with a failed reward (scored 0), 2 prompts without a readable gold." in page.text
    assert "failures – 3" in page.text and "unscorable – 2" in page.text
