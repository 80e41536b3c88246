"""Work of a few fixed sizes, replayed from CUDA graphs: one launch instead of a thousand.

Under a condition that only the device knows, a graph holds its work in a conditional node (CUDA
12.4, torch 2.13), so that the device leaves it out and the host need not ask. With an older torch,
as in TensorRT-LLM's containers, the host asks.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 2  # before a capture: kernels are compiled and libraries make their handles
HAS_CONDITIONS = hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node")


class Captured:
    """A function of a size that works on tensors that never move.

    Args:
        function: must not wait for the device; captured, it may not look at a tensor's values.
        sizes: rising; empty runs any size as it is.
        device: graphs exist on CUDA only; elsewhere sizes are padded all the same.
        condition: [] bool on the device, read when the work's turn comes. Where it does not hold
            the work may be left out, and is, unless the host need not ask and there is no graph.
    """

    def __init__(
        self,
        function: Callable[[int], None],
        sizes: Sequence[int],
        device: torch.device,
        condition: Tensor | None = None,
    ) -> None:
        self._function = function
        self._sizes = sizes
        self._condition = condition
        self._asks = condition is not None and not (condition.is_cuda and HAS_CONDITIONS)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()
            for size in reversed(sizes):  # the largest first: the others fit into its memory
                self._graphs[size] = self._capture(size, pool)

    def padded(self, size: int) -> int:
        """Return the size that will run; the largest one if none is large enough."""
        if not self._sizes:
            return size
        return self._sizes[min(bisect_left(self._sizes, size), len(self._sizes) - 1)]

    def __call__(self, size: int) -> bool:
        """Run a padded size; return False if the host asks, and the condition does not hold."""
        if self._asks and not bool(self._condition):
            return False
        if size in self._graphs:
            self._graphs[size].replay()
        else:
            self._function(size)
        return True

    def _capture(self, size: int, pool: Any) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._function(size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            if self._condition is None or self._asks:
                self._function(size)
            else:
                graph.begin_capture_to_if_node(self._condition)
                self._function(size)
                graph.end_capture_to_conditional_node()
        return graph
