"""Triton's interpreter with checked memory: what a GPU would answer with garbage, now and then, is an error here.

    bounds   an address that is read or written lies in an element of an argument of the launch. Each storage gets an
             address of its own, 2^44 apart, so that an offset that wraps in int32, or leaves one tensor for another,
             is in none
    races    what one program writes, no other program writes, nor reads unless an atomic has ordered the two. Also
             equal values: CUDA promises nothing for them. Within a program, lanes of a store that meet at an address
             hold one value, and what was stored is read behind a barrier: by another thread, maybe
    order    forwards, backwards and shuffled, the programs leave the same bits behind
    outputs  uninitialised memory is NaN, or the largest integer (`fill_new_memory`)

An atomic orders as it does on a GPU. What a program wrote before a barrier is released by an atomic that comes after
it, on one address, with "release" or "acq_rel"; who finds that address later, with "acquire" or "acq_rel", may read it
behind a barrier of its own. Barriers because one thread executes the atomic for all threads of its program.

    writer   0 or (program + 1, barriers of it so far, whether by an atomic), a number for each unit of a storage that
             the launch writes
    seen     of the running program: before which barrier of each other program it knows what that wrote
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels.backends import page_by_page

SLOT = 44  # bits of address space for each storage, which begins in the middle
PROGRAM, CLOCK = 21, 1  # bits before these fields of a writer
RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
MOST_REORDERED_BYTES = 1 << 26  # above that a storage is address space more than memory

# Of each kernel and its constants so many launches are run in every order; None: all.
reordered: int | None = 2
# Of a launch only so many programs, the first and the last, are run; None: all.
edges: tuple[int, int] | None = None


class KernelFault(AssertionError):
    """What a kernel may not do."""


def _zeros(count: int, dtype: Any) -> Any:
    return np.frombuffer(page_by_page(max(1, count) * np.dtype(dtype).itemsize), dtype)


class Region:
    """A storage, as far as arguments of the launch show it; offsets are bytes from its begin."""

    def __init__(self, place: int, views: list[tuple[str, Tensor]]) -> None:
        self.views = views
        self.storage = views[0][1].untyped_storage()
        self.real = self.storage.data_ptr()
        self.fake = (place << SLOT) + (1 << (SLOT - 1)) + self.real % 512
        self.unit = min(view.element_size() for _, view in views)
        extents = [self._extent(view) for _, view in views if view.numel()]
        self.begin = min((begin for begin, _ in extents), default=0)
        self.end = max((end for _, end in extents), default=0)
        self.shown: Any = None  # which units an argument has an element on; None: all
        if len(extents) > 1 or any(v.numel() * v.element_size() < self.end - self.begin for _, v in views):
            self.shown = _zeros((self.end - self.begin) // self.unit, bool)
            for view in (view for _, view in views if view.numel()):
                first, units = (self._extent(view)[0] - self.begin) // self.unit, view.element_size() // self.unit
                strides = (*(stride * units for stride in view.stride()), 1)
                np.lib.stride_tricks.as_strided(self.shown[first:], (*view.shape, units), strides)[...] = True
        self.writer: Any = None
        self.reads: list[tuple[Any, int, int, Any, str]] = []

    def _extent(self, view: Tensor) -> tuple[int, int]:
        """Bytes from the storage's begin."""
        begin = view.data_ptr() - self.real
        last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride()))
        return begin, begin + (last + 1) * view.element_size()

    def units(self, offsets: Any, size: int) -> Any:
        found = (offsets - self.begin) // self.unit
        return found if size == self.unit else (found[:, None] + np.arange(size // self.unit)).ravel()

    def outside(self, offsets: Any, size: int) -> Any:
        """Which of these are not elements."""
        bad = (offsets < self.begin) | (offsets + size > self.end) | (offsets % size != 0)
        if self.shown is not None and not bad.any():
            bad = ~self.shown[self.units(offsets, size)].reshape(len(offsets), -1).all(axis=1)
        return bad

    def name(self, offset: int) -> str:
        """The argument that this offset is nearest to, and the index there."""

        def distance(view: Tensor) -> int:
            begin, end = self._extent(view) if view.numel() else (0, 0)
            return max(begin - offset, offset - end + 1, 0)

        name, view = min(self.views, key=lambda named: distance(named[1]))
        index = (offset - (view.data_ptr() - self.real if view.numel() else 0)) / view.element_size()
        return f"{name}[{index:.15g}] of {tuple(view.shape)} {view.dtype}, strides {view.stride()}"


class Launch:
    """A kernel, its arguments and the program that runs."""

    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.kernel = kernel
        storages: dict[int, list[tuple[str, Tensor]]] = {}
        for name, tensor in _tensors(arguments):
            storages.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
        self.regions = {place: Region(place, views) for place, views in enumerate(storages.values(), 1)}
        self.order: list[int] | None = None
        self.whole: tuple[int, ...] | None = None  # the grid of which only the edges are run
        self.patched: set[str] = set()  # triton.language and its core, as far as this run has made them interpret
        self.known: dict[tuple[int, int], Any] = {}  # (program, clock) -> seen
        self.released: dict[int, Any] = {}  # address of an atomic -> seen
        self.grid: tuple[int, ...] = (1, 1, 1)
        self.step, self.program = 0, 0
        self.clock, self.seen, self.acquired = 0, None, None

    def begin(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Of a run; returns what the kernel takes for its grid."""
        self.grid, self.step = self.whole or grid, 0
        for region in self.regions.values():
            region.writer, region.reads = None, []
        self.known, self.released = {}, {}
        return self.grid

    def begin_program(self) -> tuple[int, int, int]:
        self.program = self.step if self.order is None else self.order[self.step]
        self.step += 1
        self.clock, self.seen, self.acquired = 0, None, None
        return self._place(self.program)

    def _place(self, program: int) -> tuple[int, int, int]:
        _, y, z = self.grid
        return program // (y * z), program // z % y, program % z

    def fault(self, what: str, line: str | None = None) -> KernelFault:
        return KernelFault(f"{self.kernel}, program {self._place(self.program)}, {line or _line()}: {what}")

    def found(self, pointers: Any, mask: Any, verb: str) -> Iterator[tuple[Region, Any, Any]]:
        """Region, which of the live pointers lie there, and their offsets; all elements of arguments."""
        live = pointers.data.ravel() if mask is None or mask.all() else pointers.data[mask]
        size = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
        slots = live >> np.uint64(SLOT)
        for slot in np.unique(slots).tolist() if live.size and (slots != slots[0]).any() else slots[:1].tolist():
            here = slots == slot
            region = self.regions.get(slot)
            if region is None:
                raise self.fault(f"{verb} of address {int(live[here][0]):#x}, which is in no argument")
            offsets = (live[here] - np.uint64(region.fake)).view(np.int64)
            bad = region.outside(offsets, size)
            if bad.any():
                raise self.fault(f"{verb} outside of the argument: {region.name(int(offsets[bad.argmax()]))}")
            yield region, here, offsets

    def access(self, pointers: Any, mask: Any, verb: str, sem: Any = None, values: Any = None) -> Any:
        """Check one load, store or atomic; returns the pointers with true addresses."""
        size = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
        real = pointers.data
        for region, here, offsets in self.found(pointers, mask, verb):
            self.touch(region, region.units(offsets, size), verb, sem)
            if values is not None:
                self.one_value(region, offsets, values[here])
            if verb == "atomic" and here.size == 1:
                self.synchronise(region.fake + int(offsets[0]), sem)
            moved = pointers.data + np.uint64((region.real - region.fake) % (1 << 64))
            real = np.where(pointers.data >> np.uint64(SLOT) == region.fake >> SLOT, moved, real)
        return interpreter.TensorHandle(real, pointers.dtype)

    def describe(self, base: Any, sizes: list[int], strides: list[int]) -> None:
        """A descriptor says that its whole extent is there."""
        last = sum((size - 1) * stride for size, stride in zip(sizes, strides))
        size = base.get_element_ty().primitive_bitwidth // 8
        ends = interpreter.TensorHandle(base.data + np.array([0, last * size], np.uint64), base.dtype)
        for _ in self.found(ends, None, "descriptor"):
            pass

    def touch(self, region: Region, units: Any, verb: str, sem: Any) -> None:
        """Keep who reads and writes what, and find the other program of a race."""
        if verb == "load":
            region.reads.append((units, self.program, self.clock, self.seen, _line()))
            if region.writer is None:
                return
        elif region.writer is None:
            region.writer = _zeros((region.end - region.begin) // region.unit, np.int64)
        before = region.writer[units]
        races = (before != 0) & (before >> PROGRAM != self.program + 1)
        if verb == "atomic":
            races &= before & 1 == 0
        if races.any() and self.seen is not None:
            races &= ~_ordered(before, self.seen)
        if races.any():
            self.race(region, int(units[races.argmax()]), int(before[races.argmax()]), verb)
        if verb == "load" and (before == (self.program + 1) << PROGRAM | self.clock << CLOCK).any():
            unit = int(units[(before >> PROGRAM == self.program + 1).argmax()])
            what = region.name(region.begin + unit * region.unit)
            raise self.fault(f"load of what this program stored, with no barrier between: {what}")
        if verb != "load":
            code = (self.program + 1) << PROGRAM | self.clock << CLOCK | (verb == "atomic")
            region.writer[units] = code

    def race(self, region: Region, unit: int, writer: int, verb: str, line: str | None = None) -> None:
        other = self._place((writer >> PROGRAM) - 1)
        raise self.fault(
            f"{verb} of what program {other} writes, with nothing that orders the two: "
            f"{region.name(region.begin + unit * region.unit)}", line,
        )  # fmt: skip

    def one_value(self, region: Region, offsets: Any, values: Any) -> None:
        """Lanes of one store that meet at an address have to agree."""
        if offsets.size == 1 or (offsets[1:] > offsets[:-1]).all():
            return
        order = np.argsort(offsets, kind="stable")
        meet = offsets[order[1:]] == offsets[order[:-1]]
        bits = values.view(f"u{values.dtype.itemsize}")[order]
        differ = meet & (bits[1:] != bits[:-1])
        if differ.any():
            offset = int(offsets[order[1:]][differ.argmax()])
            raise self.fault(f"one store puts two values into {region.name(offset)}")

    def synchronise(self, address: int, sem: Any) -> None:
        mine = np.zeros(int(np.prod(self.grid)), np.int64) if self.seen is None else self.seen.copy()
        released = self.released.get(address)
        if sem in ACQUIRES and released is not None:
            self.acquired = released if self.acquired is None else np.maximum(self.acquired, released)
        if sem in RELEASES:
            mine[self.program] = self.clock
            self.released[address] = mine if released is None else np.maximum(mine, released)

    def barrier(self) -> None:
        self.clock += 1
        if self.acquired is not None:
            self.seen = self.acquired if self.seen is None else np.maximum(self.seen, self.acquired)
            self.acquired = None
        self.known[self.program, self.clock] = self.seen

    def end(self) -> None:
        """Reads that came, in this order of programs, before another program's write."""
        for region in self.regions.values():
            for units, program, clock, seen, line in region.reads if region.writer is not None else ():
                writer = region.writer[units]
                races = (writer != 0) & (writer >> PROGRAM != program + 1)
                if races.any() and seen is not None:
                    races &= ~_ordered(writer, seen)
                for unit, code in zip(units[races].tolist(), writer[races].tolist()):
                    later = self.known.get(((code >> PROGRAM) - 1, code >> CLOCK & (1 << PROGRAM - CLOCK) - 1))
                    if later is None or later[program] <= clock:
                        self.program = program
                        self.race(region, unit, code, "load", line)


def _ordered(writers: Any, seen: Any) -> Any:
    """Which of these writes the owner of `seen` knows to be done; nobody's are some or other."""
    return (writers >> CLOCK & (1 << PROGRAM - CLOCK) - 1) < seen[(writers >> PROGRAM) - 1]


def _line() -> str:
    """Of the kernel, where it is now."""
    frame: Any = sys._getframe(1)
    while "/triton/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, dict):
        for key, x in value.items():
            yield from _tensors(x, key)
    elif isinstance(value, TensorDescriptor):
        yield from _tensors(value.base, name)
    elif isinstance(value, tuple):
        for i, x in enumerate(value):
            yield from _tensors(x, f"{name}.{i}")
    elif isinstance(value, Tensor):
        yield name, value


_launch: Launch | None = None
_launches: Counter[Any] = Counter()


def _current() -> Launch:
    assert _launch is not None, "a kernel runs outside of a launch"
    return _launch


def _in_orders(launch: Launch, run: Callable[[], None], key: Any) -> None:
    """Run the programs forwards; then, of the first launches, backwards and shuffled, and compare what they leave."""
    storages = [region.storage for region in launch.regions.values()]
    small = launch.whole is None and all(len(storage) <= MOST_REORDERED_BYTES for storage in storages)
    again = small and (reordered is None or _launches[key] < reordered)
    before = [storage.clone() for storage in storages] if again else []
    run()
    launch.end()
    count = int(np.prod(launch.grid))
    if not again or count == 1:
        return
    programs = range(count)
    _launches[key] += 1
    forwards = [storage.clone() for storage in storages]
    shuffled = random.Random(0).sample(programs, count)
    for how, launch.order in {"backwards": [*reversed(programs)], "shuffled": shuffled}.items():
        for storage, was in zip(storages, before):
            storage.copy_(was)
        run()
        launch.end()
        for region, first in zip(launch.regions.values(), forwards):
            differ = _bytes(region.storage) != _bytes(first)
            if differ.any():
                raise KernelFault(
                    f"{launch.kernel}: with its {count} programs {how} other bits in "
                    f"{region.name(int(differ.int().argmax()))}"
                )


def _bytes(storage: Any) -> Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(storage)


def fill_new_memory() -> None:
    """torch.empty and its relatives give NaN, or the largest integer."""
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True


@contextmanager
def wide(first: int = 2, last: int = 4) -> Iterator[None]:
    """For tensors of more than 2^31 numbers that hold a few: the first and last programs of each launch, and new memory
    is only handed out."""
    global edges
    edges, torch.utils.deterministic.fill_uninitialized_memory = (first, last), False
    try:
        yield
    finally:
        edges, torch.utils.deterministic.fill_uninitialized_memory = None, True


def install() -> None:
    """From here on every launch of this process is checked."""
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    call, convert = executor.__call__, interpreter._implicit_cvt

    def checked_call(self: Any, *args: Any, **kwargs: Any) -> None:
        global _launch
        arguments = dict(zip(self.arg_names, args)) | kwargs
        _launch = Launch(self.fn.__name__, arguments)
        constants = tuple((name, str(arguments.get(name))) for name in self.constexprs)

        count = int(np.prod(self.grid))
        if edges is not None and count > sum(edges):
            _launch.whole = (*self.grid, 1, 1)[:3]
            _launch.order = [*range(edges[0]), *range(count - edges[1], count)]
            self.grid = (sum(edges),)

        def run() -> None:
            _current().patched = set()
            call(self, *args, **kwargs)

        try:
            _in_orders(_launch, run, (self.fn, constants))
        except interpreter.InterpreterError as error:
            cause: BaseException | None = error
            while isinstance(cause, interpreter.InterpreterError):
                cause = cause.__cause__
            if isinstance(cause, KernelFault):
                raise cause from None
            raise
        finally:
            _launch = None

    def checked_convert(arg: Any) -> Any:
        converted = convert(arg)
        if isinstance(arg, Tensor):
            launch = _current()
            storage = arg.untyped_storage().data_ptr()
            region = next(r for r in launch.regions.values() if r.real == storage)
            address = region.fake + (arg.data_ptr() - storage if arg.numel() else 0)
            converted.handle.data = np.array([address], dtype=np.uint64)
        return converted

    patch, names = interpreter._patch_lang, {id(tl): "tl", id(tl.core): "core"}

    @cache
    def languages(fn: Any) -> frozenset[str]:
        return frozenset(names[id(x)] for x in fn.__globals__.values() if id(x) in names)

    def patch_once(fn: Any) -> Any:
        """Each call of a device function would replace all of triton.language again, a third of the time."""
        patched = _current().patched
        if languages(fn) <= patched:
            return None
        patched |= languages(fn)
        return patch(fn)

    interpreter._patch_lang = patch_once
    executor.__call__ = checked_call
    executor._init_args_hst = lambda self, args, kwargs: (args, kwargs)  # they are on the CPU
    executor._restore_args_dev = lambda *_: None
    interpreter._implicit_cvt = checked_convert
    _install_programs(builder)
    _install_memory(builder)


def _install_programs(builder: Any) -> None:
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx

    builder.set_grid_dim = lambda self, *grid: set_dim(self, *_current().begin(grid))
    builder.set_grid_idx = lambda self, *_: set_idx(self, *_current().begin_program())
    builder.create_barrier = lambda self: _current().barrier()


def _bits(mask: Any) -> Any:
    """Triton 3.6 masks what a descriptor loads or stores with an array, all else with a handle of one."""
    return mask.data if isinstance(mask, interpreter.TensorHandle) else mask


def _install_memory(builder: Any) -> None:
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas, describe = builder.create_atomic_rmw, builder.create_atomic_cas, builder.create_make_tensor_descriptor

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **how: Any) -> Any:
        return load(self, _current().access(ptrs, _bits(mask), "load"), mask, *rest, **how)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **how: Any) -> Any:
        bits = _bits(mask)
        values = value.data[bits] if not bits.all() else value.data.ravel()
        return store(self, _current().access(ptrs, bits, "store", values=values), value, mask, *rest, **how)

    def checked_rmw(self: Any, op: Any, ptrs: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        verb = "store" if scope == ir.MEM_SYNC_SCOPE.CTA else "atomic"
        return rmw(self, op, _current().access(ptrs, mask.data, verb, sem), value, mask, sem, scope)

    def checked_cas(self: Any, ptrs: Any, expected: Any, value: Any, sem: Any, scope: Any) -> Any:
        verb = "store" if scope == ir.MEM_SYNC_SCOPE.CTA else "atomic"
        return cas(self, _current().access(ptrs, None, verb, sem), expected, value, sem, scope)

    def checked_describe(self: Any, base: Any, shape: Any, strides: Any, *rest: Any, **how: Any) -> Any:
        sizes, steps = ([int(x.data.item()) for x in given] for given in (shape, strides))
        if min(sizes) > 0:
            _current().describe(base, sizes, steps)
        return describe(self, base, shape, strides, *rest, **how)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_rmw, builder.create_atomic_cas = checked_rmw, checked_cas
    builder.create_make_tensor_descriptor = checked_describe
