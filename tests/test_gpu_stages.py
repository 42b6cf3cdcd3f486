"""bench/gpu.sh in stages: what each holds, and that what was found is kept when one fails or takes too long."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import report, stages
from bench.cases import CASES

ROOT = Path(__file__).parents[1]


def test_every_case_of_a_gpu_is_in_one_stage() -> None:
    found = [case for stage in ("ops", "models", "rest") for case in stages.cases_of(stage)]
    assert len(found) == len(set(found)) and set(found) == {case for case in CASES if case.device == "cuda"}
    assert [(case.op, case.mode) for case in stages.cases_of("models")] == list(stages.MODELS)
    assert all((ROOT / path).exists() for path in stages.SMOKE)
    assert sum(stages.STAGES.values()) < 15 * 60


def test_wheels_are_the_versions_that_are_locked() -> None:
    def pins(name: str) -> set[str]:
        lines = (ROOT / name).read_text().splitlines()
        return {line.lower().replace("_", "-") for line in lines if line and not line.startswith("#")}

    assert pins("bench/wheels.txt") - pins("requirements.lock") == set()


def python(code: str, junit: Path | None = None) -> stages.Part:
    return stages.Part([sys.executable, "-c", code], junit)


def test_a_stage_that_hangs_or_fails_ends_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, junit = tmp_path / "ops.json", tmp_path / "ops.xml"
    passed, failed = "<testcase classname='a' name='b'/>", "<testcase classname='a' name='c'><failure/></testcase>"
    found = f"<testsuites><testsuite>{passed}{failed}</testsuite></testsuites>"
    writes = f"open({str(rows)!r}, 'w').write('{{\"rows\": [1, 2]}}')"
    # Interrupted, it leaves what it has.
    hangs = f"import time\n{writes}\ntry: time.sleep(60)\nfinally: open({str(junit)!r}, 'w').write({found!r})"
    parts = {"smoke": [python("raise SystemExit(3)")], "ops": [python(hangs, junit)], "models": [python("print('ok')")]}
    monkeypatch.setattr(stages, "parts_of", lambda stage, out, fake: parts[stage])
    monkeypatch.setattr(stages, "STAGES", {"smoke": 20, "ops": 2, "models": 20})
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as behind a shell
    try:
        assert stages.main(["--out", str(tmp_path)]) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    smoke, ops, models = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert smoke["statuses"] == [3] and models["statuses"] == [0] and ops["statuses"] == [None]
    assert ops["rows"] == 2 and (ops["tests"], ops["failed"]) == (2, ["a::c"]) and ops["seconds"] < 20


def test_what_is_missing_or_half_written_ends_no_other_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And a later call keeps what the first one found of other stages, but no rows of the same one."""
    junit, rows = tmp_path / "smoke.xml", tmp_path / "ops.json"
    parts = {
        "machine": [stages.Part(["no-such-command"]), python("print('doctor')")],
        "smoke": [python(f"open({str(junit)!r}, 'w').write('<testsuites><testsu')", junit)],
        "ops": [python(f"open({str(rows)!r}, 'w').write('{{\"rows\": [1, 2]}}')")],
    }
    monkeypatch.setattr(stages, "parts_of", lambda stage, out, fake: parts[stage])
    assert stages.main(["--out", str(tmp_path), "machine", "smoke", "ops"]) == 1
    parts["ops"] = [python("raise SystemExit(3)")]
    assert stages.main(["--out", str(tmp_path), "ops"]) == 1
    machine, smoke, ops = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert machine["statuses"] == [127, 0] and "no-such-command" in machine["said"][0] and "doctor" in machine["said"]
    assert smoke["statuses"] == [0] and smoke["tests"] == 0
    assert ops["statuses"] == [3] and "rows" not in ops


def test_a_stage_ends_with_the_script(tmp_path: Path) -> None:
    """As when its own limit, or a terminal, ends it."""
    code = "import os, pathlib, signal, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom bench import stages\n"
        f"stages.ROOT = Path({str(tmp_path)!r})\n"
        f"stages.parts_of = lambda *args: [stages.Part([sys.executable, '-c', {code!r}])]\n"
        f"stages.main(['--out', {str(tmp_path)!r}, 'smoke'])"
    )
    running = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    pid, until = tmp_path / "pid", time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    running.terminate()
    assert running.wait(30) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_rows_that_were_not_measured_are_on_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake.json").write_text(json.dumps({"environment": {"device": "fake", "date": "2026"}, "rows": []}))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="rows of the device fake"):
        report.load()


@pytest.mark.slow  # two minutes
def test_all_stages_run_through_without_a_gpu(tmp_path: Path) -> None:
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "bench/gpu.sh", "--fake"], cwd=ROOT, env=environment, capture_output=True, text=True)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and summary["device"] == "fake", done.stdout[-3000:]
    for stage in ("ops", "models", "rest"):
        found = json.loads((tmp_path / f"{stage}.json").read_text())
        assert found["environment"]["device"] == "fake" and len(found["rows"]) == len(stages.cases_of(stage))
    assert summary["stages"][1]["tests"] == summary["stages"][1]["skipped"] > 300
