"""The package: its version, and what a build says where there is no torch. Its files: .ci/check_dist.py."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import r1fast
from r1fast import train
from tests.test_imports import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_is_that_of_pyproject() -> None:
    assert r1fast.__version__ == PYPROJECT["project"]["version"]


def test_the_command_prints_its_version_and_torchs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        train.parse(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"r1fast {r1fast.__version__}, torch {metadata.version('torch')}\n"


def test_no_version_where_nothing_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        if name == "r1fast":
            raise metadata.PackageNotFoundError(name)
        return "2.11"

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(AttributeError, match="r1fast is not installed"):
        _ = r1fast.__version__
    with pytest.raises(SystemExit):
        train.parse(["--version"])
    assert capsys.readouterr().out == "r1fast (not installed), torch 2.11\n"


def test_a_build_gets_no_torch_of_its_own() -> None:
    assert not any(name.startswith("torch") for name in PYPROJECT["build-system"]["requires"])


def test_a_build_without_torch_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = [sys.executable, "setup.py", "egg_info"]  # what pip asks for first
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
    for part in ("No module named 'torch'", "pip install 'torch>=2.11'", "--no-build-isolation"):
        assert part in done.stderr
