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
