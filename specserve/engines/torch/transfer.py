"""Host to device and back, without making either wait more than it must."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def send(array: NDArray[Any], device: torch.device) -> Tensor:
    """Put an array on the device; from pinned memory, so that queued work is not waited for."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def lay_out(numbers: NDArray[Any], parts: Sequence[Any], sizes: Sequence[int]) -> None:
    """Write parts one after the other, each at its place and cut to its size; gaps stay.

    Args:
        parts: numbers, or arrays of one axis.
        sizes: of the places.
    """
    begin = 0
    for part, size in zip(map(np.atleast_1d, parts), sizes, strict=True):
        numbers[begin : begin + min(size, len(part))] = part[:size]
        begin += size


class LateAnswer:
    """Asks the device yes or no without stopping it: each answer comes one question late.

    While the host waits for the answer to the last question, the work queued since keeps the
    device busy. On a CPU there is nothing to hide, and answers come at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_late = device.type == "cuda"
        self._num_asked = 0
        if self._is_late:
            self._answers = torch.zeros(2, dtype=torch.bool, pin_memory=True)
            self._arrived = [torch.cuda.Event(), torch.cuda.Event()]

    def forget(self) -> None:
        """Begin anew: the next answer is yes."""
        self._num_asked = 0

    def ask(self, question: Tensor) -> bool:
        """Queue a question [] and return the answer to the one before; yes to the first."""
        if not self._is_late:
            return bool(question)
        this, before = self._num_asked % 2, (self._num_asked + 1) % 2
        self._answers[this].copy_(question, non_blocking=True)
        self._arrived[this].record()
        self._num_asked += 1
        if self._num_asked == 1:
            return True
        self._arrived[before].synchronize()
        return bool(self._answers[before])
