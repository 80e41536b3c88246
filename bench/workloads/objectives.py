"""Classes of requests and their latency objectives, absolute or relative to plain decoding.

Written NAME:SHARE:TTFT:TPOT. An objective is `40ms`, `1.5x` (times the 90th percentile of plain
decoding at low load, times the cell's SLO scale), or `-` for none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specserve.request import SLO

DEFAULT_CLASSES = ("interactive:1:-:1x",)
SYNTAX = "NAME:SHARE:TTFT:TPOT, such as interactive:0.7:500ms:1x or batch:0.3:-:4x"


@dataclass(frozen=True, slots=True)
class Objective:
    """A latency objective: seconds, or a multiple of plain decoding's."""

    value: float
    is_relative: bool


@dataclass(frozen=True, slots=True)
class RequestClass:
    """A share of the requests, and what they are promised; None is best effort."""

    name: str
    share: float
    ttft: Objective | None
    tpot: Objective | None

    def slo(self, plain: SLO, slo_scale: float) -> SLO:
        """Return its objectives.

        Args:
            plain: TTFT and TPOT of plain decoding at low load.
        """
        return SLO(
            _seconds(self.ttft, plain.ttft_s, slo_scale),
            _seconds(self.tpot, plain.tpot_s, slo_scale),
        )


def parse_classes(specs: Sequence[str]) -> list[RequestClass]:
    """Read the classes of a mix.

    Raises:
        ValueError: not of that form, a name twice, or a share or objective not above 0.
    """
    classes = [_parse(spec) for spec in specs]
    names = [one.name for one in classes]
    if len(set(names)) < len(names):
        raise ValueError(f"classes are {', '.join(names)}: each name once")
    return classes


def _parse(spec: str) -> RequestClass:
    parts = spec.split(":")
    try:
        name, share, ttft, tpot = parts
        return RequestClass(name, _above_0(share), _objective(ttft), _objective(tpot))
    except ValueError as error:
        raise ValueError(f"class is '{spec}': expected {SYNTAX}, numbers above 0") from error


def _seconds(objective: Objective | None, plain_s: float | None, slo_scale: float) -> float | None:
    if objective is None:
        return None
    if not objective.is_relative:
        return objective.value
    assert plain_s is not None, "a relative objective, and plain decoding has not been measured"
    return objective.value * plain_s * slo_scale


def _objective(text: str) -> Objective | None:
    if text == "-":
        return None
    if text.endswith("ms"):
        return Objective(_above_0(text[:-2]) / 1e3, is_relative=False)
    if text.endswith("x"):
        return Objective(_above_0(text[:-1]), is_relative=True)
    raise ValueError(text)


def _above_0(text: str) -> float:
    number = float(text)
    if not 0.0 < number < math.inf:
        raise ValueError(text)
    return number
