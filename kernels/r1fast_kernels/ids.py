"""Ids, offsets and block tables are looked at before they are followed, on a CPU and in every implementation.

On a GPU a look would wait for the device: there an id outside gives NaN or is skipped, as each op says. While a graph
is traced there is nothing to look at; C++ operators and those made of Python look for themselves, so a compiled call is
checked when it runs.
"""

import torch
from torch import Tensor


def readable(values: Tensor) -> bool:
    """Whether a look at the values waits for nothing: on a CPU, and not traced (then they are of another class)."""
    return values.device.type == "cpu" and type(values) is Tensor and not torch.compiler.is_compiling()


def check_ids(
    op: str, name: str, ids: Tensor, end: int | None, *, hint: str = "", error: type[Exception] = ValueError
) -> None:
    """0 <= id < end, or only 0 <= id where `end` is None. Raises `error` with the first id that is not."""
    if not readable(ids) or not ids.numel():
        return
    lowest, highest = (int(x) for x in ids.aminmax())
    if lowest >= 0 and (end is None or highest < end):
        return
    bad = ids < 0 if end is None else (ids < 0) | (ids >= end)
    place = bad.nonzero()[0].tolist()
    expected = "an id >= 0" if end is None else f"0 <= id < {end}"
    raise error(
        f"{op}: {name}[{', '.join(map(str, place))}] is {int(ids[tuple(place)])}, expected {expected}"
        + (f"; {hint}" if hint else "")
    )


def check_target_ids(op: str, target_ids_T: Tensor, vocab: int) -> None:
    """As torch's cross-entropy: an IndexError."""
    hint = "drop ignored positions before the call"
    check_ids(op, "target_ids_T", target_ids_T, vocab, hint=hint, error=IndexError)


def check_offsets(op: str, name: str, offsets: Tensor, last: int, *, whole: bool = True) -> None:
    """[N + 1] rising from 0 to `last`; with whole=False ends alone, of which the last may be smaller."""
    if not readable(offsets):
        return
    values = offsets.tolist()
    rising = all(a <= b for a, b in zip([0, *values], values))
    if whole:
        ok, expected = rising and values[:1] == [0] and values[-1] == last, f"[N + 1] rising from 0 to {last}"
    else:
        ok = rising and (not values or values[-1] <= last)
        expected = f"ends that do not decrease and are at most {last} rows"
    if not ok:
        more = f".. ({len(values)})" if len(values) > 8 else ""
        raise ValueError(f"{op}: got {name}={values[:8]}{more}, expected {expected}")


def check_blocks(op: str, block_table_BN: Tensor, lengths_B: Tensor, block: int, num_blocks: int) -> None:
    """Each row has 1 token to what its blocks hold, and those of its blocks that hold tokens are of the cache."""
    if not readable(block_table_BN) or not readable(lengths_B) or not lengths_B.numel():
        return
    most = block_table_BN.shape[1] * block
    outside = (lengths_B < 1) | (lengths_B > most)
    if outside.any():
        b = int(outside.nonzero()[0])
        raise ValueError(f"{op}: got lengths_B[{b}] = {int(lengths_B[b])}, expected 1 to {most}, what its blocks hold")
    used_BN = torch.arange(block_table_BN.shape[1]) * block < lengths_B[:, None]
    bad_BN = used_BN & ((block_table_BN < 0) | (block_table_BN >= num_blocks))
    if bad_BN.any():
        b, n = bad_BN.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: got block_table_BN[{b}, {n}] = {int(block_table_BN[b, n])}, expected a block of the cache, 0 to "
            f"{num_blocks - 1}"
        )
