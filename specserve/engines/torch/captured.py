"""Work of a few fixed sizes, replayed from CUDA graphs: one launch instead of a thousand."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch

WARM_UPS = 2  # before a capture: kernels are compiled and libraries make their handles
TIMED_REPLAYS = 3
WORTH_PADDING = 1.02  # of the time of a larger size: less is noise


class Captured:
    """A function of a size that works on tensors that never move.

    Args:
        function: must not wait for the device; captured, it may not look at a tensor's values.
        sizes: rising; empty runs any size as it is.
        device: graphs exist on CUDA only; elsewhere sizes are padded all the same.

    Attributes:
        sizes: see above.
    """

    def __init__(
        self, function: Callable[[int], None], sizes: Sequence[int], device: torch.device
    ) -> None:
        self.sizes = tuple(sizes)
        self._function = function
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()
            for size in reversed(sizes):  # the largest first: the others fit into its memory
                self._graphs[size] = self._capture(size, pool)

    def padded(self, size: int) -> int:
        """Return the size that will run; the largest one if none is large enough."""
        if not self.sizes:
            return size
        return self.sizes[min(bisect_left(self.sizes, size), len(self.sizes) - 1)]

    def __call__(self, size: int) -> None:
        """Run a padded size."""
        if size in self._graphs:
            self._graphs[size].replay()
        else:
            self._function(size)

    def leave_out_slow(self) -> None:
        """Drop every graph that takes longer than one of a larger size, and pad to that.

        Not every shape suits a library's kernels: on an H100, a pass of 320 tokens of 7 B weights
        takes 13 ms and one of 384 tokens 10.
        """
        fastest_s = float("inf")
        for size in list(self._graphs):  # the largest first
            seconds = _seconds(self._graphs[size])
            if seconds > WORTH_PADDING * fastest_s:
                del self._graphs[size]
            fastest_s = min(fastest_s, seconds)
        if self._graphs:
            self.sizes = tuple(sorted(self._graphs))

    def _capture(self, size: int, pool: Any) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._function(size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._function(size)
        return graph


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Time a replay: the best of a few."""
    times = []
    for _ in range(TIMED_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e-3 * begin.elapsed_time(end))
    return float(min(times))
