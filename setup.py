"""Builds the C++ extension, r1fast_kernels._C; everything else about the package is in pyproject.toml.

torch is no requirement of the build there: pip would build against the newest release, in an environment of its own,
and a library built for another torch than the one it meets does not load.
"""

import os
import platform
import shlex
import shutil
import sys
from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"r1fast: its C++ ops are built for the torch that they will run with, which cannot be imported here ({error})."
        " Install that first (pip install 'torch>=2.11' setuptools ninja), then run the same command with "
        "--no-build-isolation, without which pip hides it from the build."
    )

OPS = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
IS_X86 = platform.machine() in ("x86_64", "AMD64")
# at::vec is scalar unless told otherwise, and -march=native would crash on other machines: each op is compiled once
# per instruction set, and its operator (in the default build) picks one when it runs.
CAPABILITIES = {
    "DEFAULT": ["-DR1FAST_BUILD_OPERATOR", *(["-DR1FAST_BUILD_X86"] if IS_X86 else [])],
    "AVX2": ["-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "AVX512": [
        "-DCPU_CAPABILITY_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c",
    ],
}  # fmt: skip
# -fopenmp when compiling only: its symbols then resolve to the runtime that torch has loaded, never to a second one.
# -g0 against Python's own -g: debug information is 20 times the code. Names of functions stay, for profilers. Paths are
# cut at the source tree, so that the library is the same from a checkout and from an sdist.
FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-std=c++20", f"-ffile-prefix-map={Path.cwd()}/="]


# The options of the policy loss as C++ sees them, from their one table.
OPTIONS = "kernels/r1fast_kernels/loss_options.py"
OPTIONS_HEADER = """#pragma once
#define R1FAST_LOSS_NUMBERS(X) {numbers}
#define R1FAST_LOSS_TABLE "{table}"
enum class LossWord {{ {words} }};
"""


class Build(BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        # One place for objects, whoever builds: pip install -e would compile in a folder that it deletes, and ninja
        # compiles only what has changed. Whether torch has, dates of its headers do not tell, so each has its own.
        self.build_temp = f"build/{sys.implementation.cache_tag}-{platform.machine()}-torch-{torch.__version__}"
        self.force = True  # to link always: nor do dates tell what a library was linked from

    def build_extensions(self) -> None:
        compiler = shlex.split(os.environ.get("CXX") or "c++")[0]  # torch reads the same variable
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"r1fast: no C++ compiler found (looked for {compiler!r}). Install one (Debian: apt-get install g++), "
                "or name it in the CXX environment variable, and run the same command again."
            )
        table = run_path(OPTIONS)
        numbers, words = " ".join(f"X({name})" for name in table["NUMBERS"]), ", ".join(table["WORDS"])
        header = Path(self.build_temp) / "loss_options.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        text = OPTIONS_HEADER.format(numbers=numbers, words=words, table=table["TABLE"])
        if not header.is_file() or header.read_text() != text:  # what is written anew is compiled anew
            header.write_text(text)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        for capability in CAPABILITIES if IS_X86 else ["DEFAULT"]:
            ext.extra_objects += self.compiler.compile(
                OPS,
                output_dir=str(Path(self.build_temp) / capability),
                include_dirs=[*ext.include_dirs, str(Path(self.build_temp).resolve())],
                extra_postargs=[*FLAGS, f"-DCPU_CAPABILITY={capability}", *CAPABILITIES[capability]],
            )
        super().build_extension(ext)


setup(
    package_dir={"r1fast": "r1fast", "r1fast_kernels": "kernels/r1fast_kernels"},
    ext_modules=[
        CppExtension(
            "r1fast_kernels._C", ["csrc/register.cpp"], depends=[*OPS, *HEADERS, OPTIONS], extra_compile_args=FLAGS
        ),
    ],
    cmdclass={"build_ext": Build},
)
