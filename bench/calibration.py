"""What plain decoding can do on a trace: the unit of loads, and of relative objectives."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.outcome import Outcome
from specserve.request import SLO


@dataclass(frozen=True, slots=True)
class Calibration:
    """Plain decoding on one trace, measured in the run that uses it.

    Attributes:
        capacity_rps: requests per second that a full batch gets done while others wait.
        token_rate: their output tokens per second.
        ttft_p90_s, tpot_p90_s: at `low_load`, a share of the capacity.
        settings: everything else that the numbers, and those of the cells, depend on.
    """

    trace: str
    capacity_rps: float
    token_rate: float
    low_load: float
    ttft_p90_s: float
    tpot_p90_s: float
    settings: dict[str, Any]

    @property
    def plain(self) -> SLO:
        """What relative objectives are relative to."""
        return SLO(self.ttft_p90_s, self.tpot_p90_s)

    def describe(self) -> str:
        """Say it in a line."""
        return (
            f"{self.trace}: load 1 is {self.capacity_rps:.2f} requests/s, "
            f"{self.token_rate:.0f} output tokens/s; plain decoding at load {self.low_load:g}: "
            f"P90 TTFT {1e3 * self.ttft_p90_s:.0f} ms, P90 TPOT {1e3 * self.tpot_p90_s:.1f} ms"
        )

    def to_tree(self) -> dict[str, Any]:
        """Return the content of its line."""
        return {"calibration": asdict(self)}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "Calibration":
        """Read what `to_tree` wrote.

        Raises:
            KeyError, TypeError: something is missing or unknown.
        """
        return cls(**tree["calibration"])


def capacity(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Return requests and output tokens per second that a flood gets out of a full batch.

    Counted are the tokens between the times at which a third and two thirds of the requests have
    left, a request's tokens spread evenly over its responses; by then enough have come in to fill
    the batch, and enough wait to keep it full.

    Args:
        outcomes: finished, of requests that all arrived at once, three times what a batch holds.

    Raises:
        ValueError: they left all at once.
    """
    ends = sorted(outcome.response_s[-1] for outcome in outcomes)
    start_s, end_s = ends[len(ends) // 3], ends[2 * len(ends) // 3]
    if end_s <= start_s:
        raise ValueError(f"{len(outcomes)} requests left all at once: send more")
    num_tokens = 0.0
    for outcome in outcomes:
        first_s, last_s = outcome.response_s[0], outcome.response_s[-1]
        inside_s = min(last_s, end_s) - max(first_s, start_s)
        if last_s > first_s and inside_s > 0.0:
            num_tokens += outcome.num_output_tokens * inside_s / (last_s - first_s)
        elif start_s < last_s == first_s <= end_s:
            num_tokens += outcome.num_output_tokens
    token_rate = num_tokens / (end_s - start_s)
    mean_tokens = sum(outcome.num_output_tokens for outcome in outcomes) / len(outcomes)
    return token_rate / mean_tokens, token_rate


def check_finished(outcomes: Sequence[Outcome]) -> None:
    """Refuse to rest a grid on requests that plain decoding did not answer.

    Raises:
        ValueError: naming the first one's error.
    """
    wrong = next((outcome for outcome in outcomes if not outcome.is_finished), None)
    if wrong is not None:
        raise ValueError(f"a request of the calibration was not answered: {wrong.error}")


def p90(values: Sequence[float]) -> float:
    """Return the 90th percentile.

    Raises:
        ValueError: of nothing.
    """
    if not values:
        raise ValueError("no request of the calibration has a second token: scale lengths up")
    return float(np.percentile(values, 90))
