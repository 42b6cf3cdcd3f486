"""Imports point one way (docs/architecture.md, section 1), and what must stay light stays light; from the sources."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "rollout", "rewards", "data", "parallel", "observe")
UPSTAIRS = ("r1fast.stages", "r1fast.pipeline", "r1fast.train", "r1fast.preflight")
SOURCES = sorted([*(ROOT / "r1fast").rglob("*.py"), *(ROOT / "kernels" / "r1fast_kernels").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.with_suffix("").relative_to(ROOT).parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> list[tuple[int, str]]:
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    return list(imports_of(path.read_text(encoding="utf-8"), package))


def imports_of(text: str, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import: in functions, relative, or by import_module, too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            # A name may be a submodule: `from r1fast import stages`.
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def offences(paths: list[Path], *forbidden: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in paths
        for line, name in imported(path)
        if any(inside(name, package) for package in forbidden)
    ]


def room(name: str) -> list[Path]:
    found = [path for path in SOURCES if inside(module_name(path), f"r1fast.{name}")]
    assert found, name
    return found


def test_the_reader_of_imports_sees_every_form() -> None:
    text = (
        "import a.b as c\nfrom d import e\nfrom . import f\nfrom ..g import h\n"
        "def run():\n    from i import j\n    importlib.import_module('k.l')\n    import_module(f'm.{x}')\n"
    )
    names = [name for _, name in imports_of(text, ["r1fast", "stages"])]
    assert sorted(names) == ["a.b", "d.e", "i.j", "k.l", "m.", "r1fast.g.h", "r1fast.stages.f"]


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", "r1fast_kernels", *sys.stdlib_module_names}
    kernels = [path for path in SOURCES if inside(module_name(path), "r1fast_kernels")]
    assert len(kernels) > 5
    others = [
        f"{path.name}:{line} imports {name}"
        for path in kernels
        for line, name in imported(path)
        # hf.py plugs the ops into transformers, when asked to
        if name.split(".")[0] not in (allowed | {"transformers"} if path.name == "hf.py" else allowed)
    ]
    assert others == []


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_do_not_import_what_uses_them(name: str) -> None:
    assert offences(room(name), *UPSTAIRS) == []


@pytest.mark.parametrize("name", ["rewards", "data"])
def test_rewards_and_data_do_not_import_models(name: str) -> None:
    assert offences(room(name), "r1fast.models", "r1fast.rollout", "r1fast.parallel") == []


def test_models_know_nothing_of_the_mesh() -> None:
    assert offences(room("models"), "r1fast.parallel", "torch.distributed") == []


def test_stages_do_not_import_the_pipeline() -> None:
    assert offences(room("stages"), "r1fast.pipeline", "r1fast.train", "r1fast.preflight") == []


def test_the_pipeline_does_not_import_the_entry() -> None:
    assert offences([ROOT / "r1fast" / "pipeline.py", ROOT / "r1fast" / "config.py"], "r1fast.train") == []


def test_nothing_imports_tests_or_benchmarks() -> None:
    assert offences(SOURCES, "tests", "bench") == []
    assert offences([path for path in SOURCES if inside(module_name(path), "r1fast_kernels")], "r1fast") == []


@pytest.mark.parametrize(
    "statement",
    [
        "import r1fast",
        "import r1fast.rewards.worker",
        "from r1fast.rewards.registry import resolve; resolve('accuracy'), resolve('language')",
        "import r1fast.rewards.filters, r1fast.data.templates, r1fast.data.tasks",
        "import r1fast.config; r1fast.config.load_recipe('tiny', [])",
        "import r1fast.train; r1fast.train.parse([])",
    ],
)
def test_torch_is_not_imported_by(statement: str) -> None:
    """A reward worker starts with each pool, and torch costs it a second and 200 MB."""
    assert imported_by(statement, "torch", "transformers", "numpy") == []


def test_torchs_compiler_is_not_imported_by_the_trainer() -> None:
    """Nor all of transformers' modelling: seconds of each process, two of them for every run."""
    assert imported_by("import r1fast.pipeline", "torch._dynamo", "transformers.modeling_utils", "datasets") == []


def imported_by(statement: str, *heavy: str) -> list[str]:
    paths = [str(ROOT), str(ROOT / "kernels")]
    code = f"import sys; sys.path[:0] = {paths!r}; {statement}"
    code += f"; print(*[name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()
