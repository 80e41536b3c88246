"""One reading of /metrics: the `specserve_` samples, by name and labels. No meaning, no rates."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

PREFIX = "specserve_"

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Samples:
    """Values at one time.

    Attributes:
        time_s: when they were read.
        values: by name without the prefix: labels and value of each series.
    """

    time_s: float
    values: Mapping[str, list[tuple[Labels, float]]]

    def total(self, name: str) -> float | None:
        """Return the sum of a metric's series, None if the server does not have it."""
        series = self.values.get(name)
        return sum(value for _, value in series) if series else None

    def series(self, name: str, *labels: str) -> dict[str, float]:
        """Return a metric by the values of these labels, added up over its others.

        A server that does not have the metric, or not these labels, gives an empty one.
        """
        sums: dict[str, float] = {}
        for has, value in self.values.get(name, ()):
            if all(label in has for label in labels):
                key = " ".join(has[label] for label in labels)
                sums[key] = sums.get(key, 0.0) + value
        return sums


def parse(text: str, time_s: float) -> Samples:
    """Read the exposition format.

    Raises:
        ValueError: if it is no such text.
    """
    lines = (line for line in text.splitlines() if PREFIX in line)
    values: dict[str, list[tuple[Labels, float]]] = {}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            if math.isfinite(sample.value):  # not so for a mean over nothing
                name = sample.name.removeprefix(PREFIX)
                values.setdefault(name, []).append((sample.labels, sample.value))
    return Samples(time_s, values)
