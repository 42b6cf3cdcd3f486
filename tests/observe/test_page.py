"""The page: self-contained, escaped, and made from whatever a run left behind."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from r1fast.observe.page import build_report
from r1fast.observe.stage_section import highlight
from r1fast.report import main

VOID = {"meta"}


class _Checker(HTMLParser):
    """Every tag closed in order; collects ids, links and outside resources."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name == "href":
                self.links.append(value or "")
            if name in ("src", "srcset") or (name == "href" and not (value or "").startswith("#")):
                self.outside.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _page(run_dir: Path) -> tuple[str, _Checker]:
    path = build_report(run_dir)
    assert path == run_dir / "report.html"
    content = path.read_text(encoding="utf-8")
    checker = _Checker()
    checker.feed(content)
    assert checker.open == [], "unclosed tags"
    assert checker.outside == [] and "url(http" not in content and "@import" not in content
    return content, checker


def test_whole_chain(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    content, checker = _page(write_run(tmp_path))
    assert len(checker.ids) == len(set(checker.ids))
    assert {link.removeprefix("#") for link in checker.links} <= set(checker.ids)
    assert "This run is not complete" not in content
    for expected in ("79.1 ± 4.0", "rewards/accuracy/mean", "Kept and dropped", "mixed language", "1,637 · 29%"):
        assert expected in content


def test_text_of_the_run_is_escaped(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    summary["recipe"] = "<script>alert(1)</script>"
    summary["stages"][1]["numbers"] = {"<img src=x>": '"><svg onload=x>'}
    (run / "summary.json").write_text(json.dumps(summary))
    content, _ = _page(run)
    assert "<script>alert" not in content and "<img" not in content and "<svg onload" not in content
    assert "&lt;b&gt;so&lt;/b&gt;" in content  # from a completion


def test_stopped_run_says_where(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    content, checker = _page(write_run(tmp_path, stop_in="dev2"))
    assert "4 of 11 stages are done. Stage dev2 was running at step 20" in content
    assert "stage-dev2" in checker.ids and "stage-dev3" not in checker.ids


def test_links_to_stages_that_did_not_begin_are_left_out(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    _, checker = _page(write_run(tmp_path, stop_in="dev2"))
    assert {link.removeprefix("#") for link in checker.links} <= set(checker.ids)


@pytest.mark.parametrize("missing", ["summary.json", "config.yaml", "zero/metrics.jsonl", "zero/samples"])
def test_missing_parts(missing: str, tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path)
    path = run / missing
    for file in path.iterdir() if path.is_dir() else [path]:
        file.unlink()
    content, _ = _page(run)
    assert 'id="stage-dev1"' in content


def test_files_cut_short_by_a_kill(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path)
    (run / "summary.json").write_text('{"stages": [{"na')
    (run / "config.yaml").write_text("stages: [")
    sample = run / "zero" / "samples" / "step_00060.parquet"
    sample.write_bytes(sample.read_bytes()[:100])
    with (run / "zero" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "rew')
    content, _ = _page(run)
    assert 'id="stage-zero"' in content and "Step 30" in content and "stopped at step" in content


@pytest.mark.parametrize(("name", "content"), [
    ("config.yaml", "a: 2024-99-99"), ("config.yaml", "a: !!int x"), ("config.yaml", "a: !!timestamp x"),
    ("config.yaml", "[" * 3000), ("summary.json", ""), ("summary.json", "[]"), ("summary.json", '{"stages": 3}'),
    ("summary.json", "[" * 100_000), ("summary.json", '{"stages": [{"name": "zero", "eval_after": [1]}]}'),
    ("zero/metrics.jsonl", '{"step": 1, "moe/load": 3}'), ("zero/metrics.jsonl", '{"step": 1, "moe/load": [[]]}'),
    ("zero/metrics.jsonl", '{"step": 1, "moe/load": [[1, null], ["x"]]}'),
    ("zero/metrics.jsonl", '{"step": 2, "loss": 1e308}\n{"step": 3, "loss": -1e308}'),
])  # fmt: skip
def test_damaged_files_make_a_page(name: str, content: str, tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path)
    (run / name).write_text(content)
    assert main([str(run)]) == 0


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
    assert "scores in %" in printed and printed.rstrip().endswith("report.html")


def test_highlight_marks_tags_and_answers() -> None:
    tagged = highlight("<think>a < b</think><answer>4</answer>")
    assert '<span class="mark">&lt;think&gt;</span>a &lt; b' in tagged
    assert '<span class="answer">4</span>' in tagged
    special = highlight("|special_token|why|special_token|4")
    assert "why" in special and special.endswith('<span class="answer">4</span>')
    long = highlight("<think>" + "x" * 10_000 + "</think>")
    assert "6,500 characters" in long and len(long) < 4_000


def test_failures_stand_beside_the_scores(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run_dir = write_run(tmp_path)
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    summary["stages"][1]["eval_after"] |= {"failures": 3, "unscorable": 2}
    path.write_text(json.dumps(summary))
    content, _ = _page(run_dir)
    assert "zero: 3 samples with a failed reward (scored 0), 2 prompts without a readable gold." in content
    assert "<td>failures</td>" in content and "<td>unscorable</td>" in content
