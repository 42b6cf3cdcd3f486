"""What ranks hold, read and write of a checkpoint. Arguments: JOB OUTPUT FOLDER.

cases    FOLDER/sound holds models to load and save, FOLDER/damaged is one; OUTPUT gets what each function returns
memory   loads and saves FOLDER; OUTPUT gets the peaks of every rank in MB
"""

import re
from pathlib import Path
from typing import Any

import torch

from r1fast.models import export, tensor_files
from r1fast.parallel import parallelize
from r1fast.parallel.mesh import Dist, init_distributed
from r1fast.parallel.parallelize import gathered_blocks
from r1fast.stages import context as context_module
from r1fast.stages.context import StageContext
from tests.parallel.tiny_model import full, full_state_dict
from tests.stages.gradient_cases import SFT, context


def status(name: str) -> float:
    """MB of a line of /proc/self/status."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


class Peak:
    """MB at most above what the process held at the beginning."""

    def __enter__(self) -> "Peak":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self.before = status("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        self.megabytes = status("VmHWM") - self.before


def stage(dist: Dist, folder: Path, output: Path, **sections: Any) -> StageContext:
    ctx = context(SFT, dist, str(folder), **sections)
    ctx.run_dir = output
    output.mkdir(exist_ok=True)
    return ctx


def memory(dist: Dist, folder: Path, output: Path) -> Any:
    ctx = stage(dist, folder, output.with_name(f"{output.name}-run"))
    with Peak() as loading:
        model, tokenizer = ctx.load(str(folder), trainable=True)
    with Peak() as saving:
        ctx.save(model, tokenizer)
    held = sum(parallelize.local_tensor(param).nbytes for param in model.parameters()) / 2**20
    return dist.all_gather_objects({"held": held, "load": loading.megabytes, "save": saving.megabytes})


def embedding_gradient(model: Any) -> torch.Tensor:
    """Of the same tokens on every rank: of tied weights, both halves are in it."""
    ids, cu_seqlens = torch.tensor([5, 6, 7, 60, 3, 9, 11]), torch.tensor([0, 4, 7], dtype=torch.int32)
    model(ids, cu_seqlens).square().sum().backward()
    return full(model.get_parameter("embed_tokens.weight").grad)


def same(dist: Dist, folder: Path, output: Path) -> Any:
    """Each model loaded as one FSDP unit and as several, and saved: all tensors, and a gradient."""
    found = {}
    for path in sorted((folder / "sound").iterdir()):
        for one_unit_numel in (10**9, 0):
            name = f"{path.name}-{one_unit_numel}"
            parallelize.parallelize.__kwdefaults__["one_unit_numel"] = one_unit_numel
            trainer = {"activation_checkpointing": "none" if one_unit_numel else "full"}
            ctx = stage(dist, path, output.with_name(name), trainer=trainer)
            model, tokenizer = ctx.load(str(path), trainable=True)
            ctx.save(model, tokenizer)
            found[name] = full_state_dict(model, dist), embedding_gradient(model)
    return found


def refused(dist: Dist, folder: Path, output: Path) -> Any:
    """The error of every rank."""
    path = folder / "damaged"
    try:
        stage(dist, path, output.with_name("damaged-run")).load(str(path), trainable=True)
        error = "none"
    except ValueError as raised:
        error = str(raised)
    return dist.all_gather_objects(error)


def disk_full(dist: Dist, folder: Path, output: Path) -> Any:
    """What every rank sees of a disk that is full on rank 0."""
    path = folder / "sound" / "deepseek_v3"
    ctx = stage(dist, path, output.with_name("full"))
    model, tokenizer = ctx.load(str(path), trainable=True)
    pieces, room = export._pieces, iter(range(3))
    blocks = gathered_blocks(model, dist)

    def until_full(*args: Any) -> Any:
        for piece in pieces(*args):
            if next(room, None) is None:
                raise OSError("No space left on device")
            yield piece

    export._pieces = until_full
    context_module.gathered_blocks = lambda *_: blocks
    try:
        ctx.save(model, tokenizer)
        error = "none"
    except OSError as raised:
        error = str(raised)
    left = sorted(path.name for path in ctx.stage_dir.iterdir())
    return dist.all_gather_objects((error, left, sum(1 for _ in blocks)))


def cases(dist: Dist, folder: Path, output: Path) -> Any:
    # So that chunks, blocks and shards end inside of tensors.
    tensor_files.CHUNK_BYTES, parallelize.BLOCK_BYTES, export.MAX_SHARD_BYTES = 1_000, 1_500, 20_000
    return {case.__name__: case(dist, folder, output) for case in (same, refused, disk_full)}


def main(argv: list[str]) -> None:
    job, output, folder = argv
    dist = init_distributed("cpu")
    found = {"memory": memory, "cases": cases}[job](dist, Path(folder), Path(output))
    if dist.is_main:
        torch.save(found, output)
    dist.close()
