"""The Helm chart through Helm's own library, in a process of its own.

The library brings Go's runtime along, which ends a process in which certain others have run.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

CHART = Path(__file__).resolve().parent.parent / "docker" / "helm" / "specserve"
Values = dict[str, Any]

P = ParamSpec("P")
R = TypeVar("R")


class Helm:
    """The chart of `docker/helm`."""

    def __init__(self) -> None:
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def close(self) -> None:
        """End the process."""
        self._process.shutdown()

    def render(self, values: Values) -> dict[str, str]:
        """Return the files of a release called `demo` in the namespace `ml`."""
        return self._call(_render, values)

    def lint(self, values: Values) -> dict[str, Any]:
        """Return Helm's report."""
        return self._call(_lint, values)

    def refusal(self, values: Values) -> str | None:
        """Return what the chart's schema says against some values."""
        return self._call(_refusal, values)

    def _call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return self._process.submit(function, *args, **kwargs).result()


def _render(values: Values) -> dict[str, str]:
    import helm_python

    with helm_python.Chart.load(CHART) as chart:
        return dict(chart.render(values, name="demo", namespace="ml"))


def _lint(values: Values) -> dict[str, Any]:
    import helm_python

    return dict(helm_python.lint(CHART, values, strict=True, kube_version="v1.34.0"))


def _refusal(values: Values) -> str | None:
    import helm_python

    with helm_python.Chart.load(CHART) as chart:
        try:
            chart.validate_schema(chart.merge_values(values))
        except helm_python.HelmValuesError as error:
            return str(error)
    return None
