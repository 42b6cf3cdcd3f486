"""report.html: one self-contained page from a run directory, of a run that ended or stopped anywhere."""

from pathlib import Path

from r1fast.observe.markup import Html, anchor, tag
from r1fast.observe.overview import chain_card, page_header, score_card, tiles, time_card, unfinished_notice
from r1fast.observe.page_style import SCRIPT, STYLE
from r1fast.observe.run_data import RunData, load_run
from r1fast.observe.stage_section import stage_section
from r1fast.run_folder import replace_file


def build_report(run_dir: Path) -> Path:
    """Write RUN/report.html from RUN/config.yaml, summary.json, */metrics.jsonl and */samples/*.parquet.

    Returns the page's path; an older page is replaced whole. A directory without any of these is a ValueError; one
    that cannot be written an OSError.
    """
    run = load_run(Path(run_dir))
    path = run.directory / "report.html"
    replace_file(path, render(run).encode(errors="replace"))
    return path


def render(run: RunData) -> str:
    """The page as text."""
    cards = [chain_card(run.stages), score_card(run.stages), time_card(run.stages)]
    begun = [(i, stage) for i, stage in enumerate(run.stages, start=1) if stage.begun]
    sections = [stage_section(stage, i) for i, stage in begun]
    main = tag(
        "main",
        page_header(run),
        unfinished_notice(run.stages),
        tiles(run),
        *cards,
        *sections,
        _recipe(run),
        tag("footer", "Written by r1fast from this run's own files; it loads nothing from elsewhere."),
    )
    head = tag(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", f"{run.recipe} · r1fast"),
        tag("style", Html(STYLE)),
    )
    body = tag("body", _navigation(run, [stage.name for _, stage in begun]), main, tag("script", Html(SCRIPT)))
    return "<!doctype html>\n" + tag("html", head, body, lang="en")


def _navigation(run: RunData, names: list[str]) -> Html:
    links = [tag("a", name, href=f"#{anchor(name)}") for name in names]
    button = tag("button", "light / dark", id="theme", type="button")
    return tag("nav", tag("div", tag("b", "r1fast"), *links, button))


def _recipe(run: RunData) -> Html | None:
    if not run.config_text:
        return None
    fold = tag(
        "details", tag("summary", "The resolved recipe (config.yaml)"), tag("pre", run.config_text, class_="block")
    )
    return tag("section", tag("h2", "Recipe"), fold, class_="card")
