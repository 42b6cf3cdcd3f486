"""What `make dist` has put into dist/: one sdist with all that a build needs, and one small wheel, with nothing else.

The wheel's C++ library has to be the one in the source tree, which is the one that the tests have run.
"""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

MOST_WHEEL_BYTES = 3_000_000  # 1.4 MB when this was written
BUILD_FILES = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}


def tracked(*folders: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", *folders], check=True, capture_output=True, text=True)
    return set(listed.stdout.splitlines())


def only(pattern: str) -> Path:
    found = sorted(Path("dist").glob(pattern))
    if len(found) != 1:
        sys.exit(f"dist/{pattern}: got {len(found)} files, expected one: make dist")
    return found[0]


def differences(what: str, got: set[str], expected: set[str]) -> list[str]:
    missing = [f"{what} lacks {name}" for name in sorted(expected - got)]
    return missing + [f"{what} has {name}, which does not belong there" for name in sorted(got - expected)]


def sdist_problems(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        names = {PurePosixPath(member.name) for member in archive if member.isfile()}
    got = {str(PurePosixPath(*name.parts[1:])) for name in names}
    made = {name for name in got if name in ("PKG-INFO", "setup.cfg") or name.startswith("r1fast.egg-info/")}
    return differences(path.name, got - made, tracked("r1fast", "kernels", "csrc") | BUILD_FILES)


def wheel_problems(path: Path, version: str) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    info = f"r1fast-{version}.dist-info"
    libraries = [name for name in contents if name.startswith("r1fast_kernels/_C.") and name.endswith(".so")]
    packages = tracked("r1fast") | {name.removeprefix("kernels/") for name in tracked("kernels")}
    got = {name for name in contents if not name.startswith(f"{info}/")} - set(libraries)
    problems = differences(path.name, got, packages)
    stated = Parser().parsestr(contents[f"{info}/METADATA"].decode())["Version"]
    if stated != version:
        problems.append(f"{path.name} states version {stated}, pyproject.toml {version}")
    if len(libraries) != 1:
        return [*problems, f"{path.name} has {len(libraries)} C++ libraries, expected one"]
    library = contents[libraries[0]]
    tested = Path("kernels", libraries[0])
    if not tested.is_file() or tested.read_bytes() != library:
        problems.append(f"{path.name}: {libraries[0]} is not the library in kernels/, which the tests run: make dist")
    if str(Path.cwd()).encode() in library:
        problems.append(f"{path.name}: {libraries[0]} names the folder that it was built in")
    if (size := path.stat().st_size) > MOST_WHEEL_BYTES:
        problems.append(f"{path.name} has {size:,} bytes, at most {MOST_WHEEL_BYTES:,} are expected: what has grown?")
    print(f"{path.name}: {size:,} bytes, its C++ library {len(library):,}")
    return problems


def main() -> None:
    version = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    problems = sdist_problems(only("r1fast-*.tar.gz")) + wheel_problems(only("r1fast-*.whl"), version)
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
