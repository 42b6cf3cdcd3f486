"""CUDA graphs of the decode step: one launch a token. Alone, its thousand kernels take the host longer to launch than
a GPU to run.

A graph steps a fixed number of rows, its bucket; behind the rows in use is padding (input_batch.py). As rows leave:

    rows in use     256 ......... 128 | 127 ...... 64 | 63 ...
    step by step    8                 |               |              eager: what is short is not captured
    graph of          256             | 256  128      | 128  64      the larger one for 8 steps, then the closer

A closer one is captured where the graph at hand has more than MOST_PADDING times the rows. Below that padding costs
little: a step reads all weights for one row too. A graph also has a width, the columns of the block table that it
reads: enough for the longest row, so that wider ones follow as rows grow, and at most MOST_PADDING times as many.
Graphs share their memory; a wider one adds to it what attention keeps of its spans. Where there is no room for one,
steps run by the graphs that are there, or op by op.

Graphs live for one call of `generate`, because its cache and buffers do, whose memory is training's afterwards. To
capture takes about what a graph saves in some tens of steps, of a thousand. What a graph has the addresses of does not
move in that time: parameters do when sharded ones are gathered, and not when an optimizer writes them.
"""

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable
from functools import cache, partial

import torch

logger = logging.getLogger("r1fast")
STEPS_BEFORE = 8  # of a bucket, until it is captured
MOST_PADDING = 2

Step = Callable[[], None]


def bucket_of(num_rows: int, max_rows: int) -> int:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, .. and at last max_rows: the first with room for num_rows."""
    power = 1 << (num_rows - 1).bit_length()
    between = power // 4 * 3
    return min(between if power >= 32 and num_rows <= between else power, max_rows)


class StepGraphs:
    """Runs steps of any number of rows up to max_rows, by graphs where it pays. Buffers have max_rows rows.
    Widths are few (input_batch.py:width_of).

    capture: runs a step and returns what repeats it, or None where there is no room for that (CudaCapture).
    """

    def __init__(self, max_rows: int, capture: Callable[[Step], Step | None]) -> None:
        self.max_rows, self.capture = max_rows, capture
        self.is_full = False  # there is no room for another
        self.graphs: dict[tuple[int, int], Step] = {}  # by rows and width
        self.steps_without: Counter[tuple[int, int]] = Counter()

    def run(self, step: Callable[[int, int], None], num_rows: int, width: int) -> None:
        """step(n, w): the first n rows, w columns of their block tables. Given anew each time: kept, it would keep its
        owner, and the cache, alive."""
        enough = [bucket for bucket in self.graphs if bucket[0] >= num_rows and bucket[1] >= width]
        closest = min(enough, key=math.prod, default=None)
        bucket = bucket_of(num_rows, self.max_rows), width
        is_far = closest is None or closest[0] > MOST_PADDING * num_rows or closest[1] > MOST_PADDING * width
        self.steps_without[bucket] += is_far
        if is_far and self.steps_without[bucket] > STEPS_BEFORE and not self.is_full:
            graph = self.capture(partial(step, *bucket))
            self.is_full = graph is None
            self.graphs |= {} if graph is None else {bucket: graph}
        elif closest is not None:
            self.graphs[closest]()
        else:
            step(num_rows, width)


@cache
def _stream_of(thread: int, device: int) -> torch.cuda.Stream:
    """cuBLAS keeps a workspace (32 MiB on Hopper) for every stream that it ever met: no new one for each call."""
    return torch.cuda.Stream(device)


def _bytes_of(stream: torch.cuda.Stream) -> int:
    """What the allocator has taken for the ops of a stream, beside the pools of graphs."""
    segments = torch.cuda.memory_snapshot() if torch.cuda.get_allocator_backend() == "native" else []
    mine = [x for x in segments if (x["device"], x["stream"]) == (stream.device_index, stream.cuda_stream)]
    return sum(x["total_size"] for x in mine if tuple(x["segment_pool_id"]) == (0, 0))


_one_at_a_time = threading.Lock()


class CudaCapture:
    """Captures the steps of one call of `generate`, on the current device.

    Other threads may train meanwhile, but not draw from the device's default generator: torch takes that for captured.
    Ours never do: initial weights come from generators of their own, samples from hashes of their seeds.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step | None:
        stream = _stream_of(threading.get_ident(), torch.cuda.current_device())
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            step()  # a token like any other; and kernels are compiled and loaded, which a capture could not do
        current.wait_stream(stream)
        # A capture that runs out of memory would end the process (below): what the step took has to be there again.
        needed = _bytes_of(stream)
        torch.cuda.empty_cache()  # as torch.cuda.graph does: a capture can use nothing of what others have had
        if needed > (free := torch.cuda.mem_get_info()[0]):
            text = "steps are not captured any more: a CUDA graph takes up to %s bytes, and %s are free"
            advice = "lower max_num_seqs or kv_cache_memory_bytes"
            logger.warning(f"generation: {text}; {advice}", f"{needed:,}", f"{free:,}")
            return None
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do, the watchdog of NCCL for one, does not end the capture.
        capture = torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local")
        try:
            with _one_at_a_time, capture:
                step()
        except RuntimeError as error:
            # Where an op broke the capture, ending it raises in its turn and says less. There is no going on without a
            # graph: torch's allocator does not recover from this.
            cause = error.__context__ or error
            if any(isinstance(x, torch.OutOfMemoryError) for x in (error, cause)):
                raise RuntimeError(
                    "no memory was left for the CUDA graph of a decode step: set kv_cache_memory_bytes (in a recipe "
                    f"rollout.kv_cache_memory_bytes) lower, or max_num_seqs, or enforce_eager=True: {cause}"
                ) from error
            raise RuntimeError(
                "the decode step of this model cannot be captured as a CUDA graph; enforce_eager=True (in a recipe "
                f"rollout.enforce_eager: true) decodes without: {cause}"
            ) from error
        return graph.replay


# What makes a `capture` for a call of `generate`, by type of device. On others every step runs op by op.
CAPTURES: dict[str, Callable[[], Callable[[Step], Step | None]]] = {"cuda": CudaCapture}
