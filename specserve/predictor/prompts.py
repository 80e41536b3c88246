"""What the prompt tokens of a step take, more or less than as many tokens to verify."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Row

Floats = NDArray[np.float64]


class Prompts(NamedTuple):
    """The prompt tokens of a step.

    Attributes:
        num_tokens: those whose logits nobody wants.
        num_pairs: of tokens and the ones before that they attend to.
    """

    num_tokens: int = 0
    num_pairs: int = 0

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Prompts":
        """Count those of a batch."""
        chunks = [
            cls.chunk(len(row.token_ids) - row.samples, row.num_computed_tokens)
            for row in rows
            if len(row.token_ids) > row.samples
        ]
        return cls(*map(sum, zip(*chunks, strict=True))) if chunks else cls()

    @classmethod
    def chunk(cls, num_tokens: int, start: int) -> "Prompts":
        """Count those of one prompt from a position on."""
        return cls(num_tokens, num_tokens * start + num_tokens * num_tokens // 2)


NO_PROMPTS = Prompts()
ITERATIONS, LEAST_ERROR = 30, 1e-3  # of the fit; relative errors below count as equal


@dataclass(frozen=True, slots=True)
class PromptTime:
    """Seconds that a step with prompts takes more: fixed + token * tokens + pair * pairs.

    A prompt's token has no logits, so `token` is mostly below 0. But every one looks back at all
    before it, which is dear on a CPU; and a step with a prompt is of another size than the last.
    """

    fixed: float = 0.0
    token: float = 0.0
    pair: float = 0.0

    def __call__(self, prompts: Prompts) -> float:
        """Predict them; nothing without prompts."""
        if not prompts.num_tokens:
            return 0.0
        return self.fixed + self.token * prompts.num_tokens + self.pair * prompts.num_pairs

    @classmethod
    def fit(cls, prompts: Sequence[Prompts], more: Floats, full: Floats) -> "PromptTime":
        """Fit by least absolute relative errors; few sizes leave `pair` and `fixed` at 0.

        Args:
            more: [n] seconds that each took more than as many tokens to verify.
            full: [n] what those take.
        """
        if not prompts:
            return cls()
        counts = np.array(prompts, dtype=np.float64)
        num_sizes = len(set(prompts))
        columns = [counts[:, 0], np.ones(len(prompts)), counts[:, 1]][:num_sizes]
        solution = _solve(columns, more / full, 1.0 / full)
        if len(solution) == 3 and solution[2] < 0.0:
            solution = _solve(columns[:2], more / full, 1.0 / full)
        token, fixed, pair = [*solution, 0.0, 0.0][:3]
        return cls(fixed, token, pair)


def _solve(columns: Sequence[Floats], values: Floats, weights: Floats) -> list[float]:
    """Minimise absolute errors by reweighted least squares: a slow moment must not count twice."""
    matrix = np.stack(columns, axis=1) * weights[:, None]
    solution = np.linalg.lstsq(matrix, values, rcond=None)[0]
    for _ in range(ITERATIONS):
        root = np.maximum(np.abs(matrix @ solution - values), LEAST_ERROR) ** -0.5
        solution = np.linalg.lstsq(matrix * root[:, None], values * root, rcond=None)[0]
    coefficients: list[float] = solution.tolist()
    return coefficients
