"""Kernels with a fault put into their source, in place of the originals while a test runs."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from triton.runtime.interpreter import InterpretedFunction

import r1fast_kernels

MODULES = [
    importlib.import_module(f"r1fast_kernels.{found.name}")
    for found in pkgutil.iter_modules(r1fast_kernels.__path__)
    if found.name != "_C"
]


def kernels_of(stem: str) -> Iterator[tuple[str, str]]:
    """Name and source of what Triton runs in kernels/r1fast_kernels/<stem>.py."""
    for name, value in vars(importlib.import_module(f"r1fast_kernels.{stem}")).items():
        if isinstance(value, InterpretedFunction) and value.fn.__module__ == f"r1fast_kernels.{stem}":
            yield name, inspect.getsource(value.fn)


def put(patch: pytest.MonkeyPatch, folder: Path, stem: str, name: str, source: str) -> None:
    """This source for a kernel, or for a function that kernels call, wherever it was imported."""
    original = getattr(importlib.import_module(f"r1fast_kernels.{stem}"), name)
    path = folder / f"{name}.py"
    path.write_text(source)
    names = dict(original.fn.__globals__)
    exec(compile(source, path, "exec"), names)
    for module in MODULES:
        if vars(module).get(name) is original:
            patch.setattr(module, name, names[name])


def mutate(patch: pytest.MonkeyPatch, folder: Path, stem: str, name: str, *replacements: tuple[str, str]) -> None:
    """Put a kernel with (old, new) replaced in its place; an error where the source has `old` not exactly once."""
    source = dict(kernels_of(stem))[name]
    for old, new in replacements:
        assert source.count(old) == 1, f"{name} has {source.count(old)} times: {old}"
        source = source.replace(old, new)
    put(patch, folder, stem, name, source)
