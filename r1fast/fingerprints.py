"""What tells one content of a file or folder from another, cheaply enough for every start of a stage.

A file of up to 64 MiB counts whole. Of a larger one count its size and 64 blocks of 1 MiB, evenly spread from the first
to the last: a file that was exchanged, cut short or trained on shows, single bits between the blocks need not. Times
of change count for nothing: a copy is the same file.
"""

import hashlib
from pathlib import Path

WHOLE_BYTES = 64 << 20
NUM_BLOCKS, BLOCK_BYTES = 64, 1 << 20


def fingerprint(path: Path) -> str:
    """Of a file, or of all files in a folder with their names; "missing" where nothing is. Raises OSError."""
    if not path.exists():
        return "missing"
    if not path.is_dir():
        return _of_file(path)
    total = hashlib.blake2b(digest_size=16)
    for file in sorted(path.rglob("*")):
        if file.is_file():
            total.update(f"{file.relative_to(path)}\0{_of_file(file)}\0".encode(errors="surrogateescape"))
    return total.hexdigest()


def _of_file(path: Path) -> str:
    size = path.stat().st_size
    total = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            total.update(file.read())
        for block in range(NUM_BLOCKS) if size > WHOLE_BYTES else ():
            file.seek((size - BLOCK_BYTES) * block // (NUM_BLOCKS - 1))
            total.update(file.read(BLOCK_BYTES))
    return total.hexdigest()


def hub_commit(repo_id: str, kind: str) -> str:
    """The commit of a Hub repository ("model" or "dataset") that the local cache holds, or "unknown"."""
    from huggingface_hub.constants import HF_HUB_CACHE

    ref = Path(HF_HUB_CACHE) / f"{kind}s--{repo_id.replace('/', '--')}" / "refs" / "main"
    return ref.read_text().strip() if ref.is_file() else "unknown"
