"""Typed access to the tensors of a call. Knows types and limits, not what the values are for."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specserve.config import LimitsConfig

Tensors = Mapping[str, NDArray[Any]]


class Reader:
    """Typed access to a call's tensors; absent or empty ones give the default."""

    def __init__(self, tensors: Tensors, limits: LimitsConfig) -> None:
        self._tensors = tensors
        self._limits = limits

    def __contains__(self, name: str) -> bool:
        return name in self._tensors and self._tensors[name].size > 0

    def array(self, name: str) -> NDArray[Any]:
        """Return the flat values, empty if absent."""
        return self._tensors[name].reshape(-1) if name in self else np.empty(0)

    def integer(self, name: str, default: int) -> int:
        """Return a whole number."""
        return int(self._one(name)) if name in self else default

    def number(self, name: str, default: float) -> float:
        """Return a number as the client wrote it: FP32 .7 is .7, not .699999988."""
        return float(str(self._one(name))) if name in self else default

    def flag(self, name: str, default: bool) -> bool:
        """Return a truth value."""
        return bool(self._one(name)) if name in self else default

    def count(self, name: str) -> int | None:
        """Return a number of at least 0, or None if absent."""
        if name not in self:
            return None
        value = self.integer(name, 0)
        if value < 0:
            raise ValueError(f"{name} is {value}: must be at least 0")
        return value

    def required_int(self, name: str) -> int:
        """Return a whole number that must be there."""
        if name not in self:
            raise ValueError(f"{name} is missing: it is required")
        return self.integer(name, 0)

    def either(self, old: str, new: str) -> int | None:
        """Return the number of at least 0 under either spelling, or None."""
        if old in self and new in self and self._one(old) != self._one(new):
            raise ValueError(f"{old} and {new} are two spellings of one thing: give one of them")
        return self.count(old if old in self else new)

    def seconds(self, name: str) -> float | None:
        """Return milliseconds as seconds, or None."""
        if name not in self:
            return None
        value = self.number(name, 0.0)
        if not 0.0 < value < float("inf"):
            raise ValueError(f"{name} is {value}: must be above 0 and finite, in milliseconds")
        return value / 1000.0

    def text(self, name: str) -> str | None:
        """Return a string, or None."""
        return decode_text(self._one(name), name, self._limits) if name in self else None

    def words(self, name: str) -> list[str]:
        """Return a list of strings within the limits."""
        values = self.array(name).tolist()
        limits = self._limits
        if len(values) > limits.max_words:
            raise ValueError(f"{name} has {len(values)} entries: the limit is {limits.max_words}")
        for value in values:
            if len(value) > limits.max_word_bytes:
                raise ValueError(
                    f"{name} has an entry of {len(value)} bytes: the limit is "
                    f"{limits.max_word_bytes}"
                )
        return [decode_text(value, name, limits) for value in values]

    def _one(self, name: str) -> Any:
        values = self._tensors[name].reshape(-1)
        if len(values) != 1:
            raise ValueError(f"{name} has {len(values)} values: give one")
        return values[0]


def decode_text(value: bytes, name: str, limits: LimitsConfig) -> str:
    """Decode UTF-8 within the size limit."""
    if len(value) > limits.max_text_bytes:
        raise ValueError(f"{name} has {len(value)} bytes: the limit is {limits.max_text_bytes}")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8: byte {value[error.start]:#04x} at position {error.start}"
        ) from None
