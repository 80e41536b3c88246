"""How long a step takes: theory, times a measured staircase, times what serving has taught since.

Owns the prediction of draft and verification time and its error. Decides nothing.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specserve.predictor.profile import DraftSample, Profile, VerifySample
from specserve.predictor.roofline import Roofline
from specserve.predictor.telemetry import NoTelemetry, Telemetry

Floats = NDArray[np.float64]


class StepTimeModel:
    """Predicts T(draft forwards, target tokens, context tokens) in seconds.

    verify(n, c) = roofline(n, c; device state) * staircase(n) * correction(n) - prompt tokens'
    saved logits. draft = call overhead + one time per forward, by the rows still drafting.
    """

    def __init__(self, profile: Profile, telemetry: Telemetry | None = None) -> None:
        self.telemetry: Telemetry = telemetry or NoTelemetry()
        self._verify = _VerifyTime(profile.verify)
        self._draft = _DraftTime(profile.draft)

    def verify_curve(
        self, num_tokens: int, num_more: int, context_tokens: int, num_prompt_tokens: int = 0
    ) -> Floats:
        """Predict verification of num_tokens, num_tokens + 1, ..., num_tokens + num_more tokens.

        Args:
            num_tokens: target tokens of the step, at least 1, prompt tokens included.
            context_tokens: cached tokens that all rows read, together.
            num_prompt_tokens: of num_tokens, those whose logits nobody wants.

        Returns:
            [num_more + 1] seconds; never falls.
        """
        state = self.telemetry.read()
        n = np.arange(num_tokens, num_tokens + num_more + 1, dtype=np.float64)
        return self._verify.predict(
            n, context_tokens, num_prompt_tokens, state.compute_scale, state.memory_scale
        )

    def verify_s(self, num_tokens: int, context_tokens: int, num_prompt_tokens: int = 0) -> float:
        """Predict one verification."""
        return float(self.verify_curve(num_tokens, 0, context_tokens, num_prompt_tokens)[0])

    def forward_curve(self, num_rows: int, context_tokens: int = 0) -> Floats:
        """Predict one more draft forward of 0, 1, ..., num_rows rows.

        Args:
            context_tokens: cached tokens of all num_rows rows; fewer rows read their share.

        Returns:
            [num_rows + 1] seconds.
        """
        context_of_row = context_tokens / max(1, num_rows)
        return self._draft.forward(np.arange(num_rows + 1, dtype=np.float64), context_of_row)

    def draft_s(
        self,
        rows_of_forwards: Sequence[int],
        num_catch_up_tokens: int = 0,
        context_tokens: int = 0,
    ) -> float:
        """Predict a whole draft call; no forwards take no time.

        Args:
            rows_of_forwards: rows of the first, second, ... forward.
            num_catch_up_tokens: of the first forward, one per row included.
            context_tokens: cached tokens of the first forward's rows.
        """
        return self._draft.call(rows_of_forwards, num_catch_up_tokens, context_tokens)

    def observe_verify(
        self, num_tokens: int, context_tokens: int, num_prompt_tokens: int, seconds: float
    ) -> None:
        """Learn one measured verification."""
        predicted = self.verify_s(num_tokens, context_tokens, num_prompt_tokens)
        self._verify.correction.observe(num_tokens, predicted, seconds)

    def observe_draft(
        self,
        rows_of_forwards: Sequence[int],
        num_catch_up_tokens: int,
        context_tokens: int,
        seconds: float,
    ) -> None:
        """Learn one measured draft call."""
        if rows_of_forwards:
            predicted = self.draft_s(rows_of_forwards, num_catch_up_tokens, context_tokens)
            self._draft.correction.observe(rows_of_forwards[0], predicted, seconds)

    def verify_error(self) -> tuple[float, float]:
        """Return median and 95th percentile of the absolute percentage error of late."""
        return self._verify.correction.error()

    def draft_error(self) -> tuple[float, float]:
        """Return median and 95th percentile of the absolute percentage error of late."""
        return self._draft.correction.error()


class Correction:
    """A factor on a prediction, learnt from every measurement, mostly common, partly by size.

    Steps on the log of the error are clipped, so an outlier moves little and a lasting change is
    followed within some twenty measurements.
    """

    COMMON_RATE = 0.15
    LOCAL_RATE = 0.05
    CLIP = 0.3
    WINDOW = 512

    def __init__(self) -> None:
        self._common = 0.0
        self._local = np.zeros(16)  # by log2 of the size
        self._errors: deque[float] = deque(maxlen=self.WINDOW)

    def factor(self, sizes: Floats) -> Floats:
        """Return the factor for each size."""
        cells = np.log2(np.maximum(sizes, 1.0))
        value: Floats = np.exp(self._common + np.interp(cells, np.arange(16), self._local))
        return value

    def observe(self, size: int, predicted: float, measured: float) -> None:
        """Learn from one pair of predicted and measured seconds; no time says nothing."""
        if measured <= 0.0:
            return
        self._errors.append(abs(predicted - measured) / measured)
        error = float(np.clip(np.log(measured / predicted), -self.CLIP, self.CLIP))
        self._common += self.COMMON_RATE * error
        cell = np.log2(max(size, 1))
        low = min(int(cell), 14)
        for index, weight in ((low, 1.0 - (cell - low)), (low + 1, cell - low)):
            self._local[index] += self.LOCAL_RATE * weight * error
        self._local *= 0.999  # what all sizes share belongs to the common part

    def error(self) -> tuple[float, float]:
        """Return median and 95th percentile of |predicted - measured| / measured."""
        if not self._errors:
            return 0.0, 0.0
        median, p95 = np.percentile(self._errors, (50, 95))
        return float(median), float(p95)


class _VerifyTime:
    """Roofline times staircase times correction."""

    def __init__(self, samples: Sequence[VerifySample]) -> None:
        full = [s for s in samples if s.num_logit_rows == s.num_tokens]
        self._roofline = Roofline.fit(
            [s.num_tokens for s in full],
            [s.context_tokens for s in full],
            [s.seconds for s in full],
        )
        self._sizes, self._steps = self._staircase(full)
        self._logits_s = self._logits_of_a_token(samples)
        self.correction = Correction()

    def predict(
        self, n: Floats, context: float, num_prompt: int, compute_scale: float, memory_scale: float
    ) -> Floats:
        theory = self._roofline(n, context, compute_scale, memory_scale)
        stair = np.interp(np.log(n), np.log(self._sizes), self._steps)
        saved = np.minimum(self._logits_s * num_prompt, 0.5 * theory)
        seconds: Floats = (theory * stair - saved) * self.correction.factor(n)
        return np.maximum.accumulate(seconds)

    def _staircase(self, samples: Sequence[VerifySample]) -> tuple[Floats, Floats]:
        """Return sizes and measured time over theory at each, made monotone in time."""
        sizes = np.array(sorted({s.num_tokens for s in samples}), dtype=np.float64)
        ratios, theory = [], []
        for size in sizes:
            same = [s for s in samples if s.num_tokens == size]
            predicted = self._roofline(
                np.array([size] * len(same)), np.array([float(s.context_tokens) for s in same])
            )
            ratios.append(float(np.median([s.seconds for s in same] / predicted)))
            theory.append(float(np.median(predicted)))
        monotone = isotonic(np.array(ratios) * np.array(theory))
        return sizes, monotone / np.array(theory)

    def _logits_of_a_token(self, samples: Sequence[VerifySample]) -> float:
        saved = []
        for s in samples:
            if s.num_logit_rows < s.num_tokens:
                n = np.array([float(s.num_tokens)])
                stair = np.interp(np.log(n), np.log(self._sizes), self._steps)
                full = float((self._roofline(n, float(s.context_tokens)) * stair)[0])
                saved.append((full - s.seconds) / (s.num_tokens - s.num_logit_rows))
        return max(0.0, float(np.median(saved))) if saved else 0.0


class _DraftTime:
    """Catch-up tokens and forwards, each linear; kv per token of context in each forward."""

    def __init__(self, samples: Sequence[DraftSample]) -> None:
        columns = [
            [
                1.0,
                s.num_catch_up_tokens - s.num_rows,
                s.num_forwards,
                s.num_forwards * s.num_rows,
                s.num_forwards * s.context_tokens,
            ]
            for s in samples
        ]
        t = np.array([s.seconds for s in samples])
        weight = 1.0 / t  # relative error counts
        solution = _non_negative_least_squares(np.array(columns) * weight[:, None], t * weight)
        self._overhead, self._per_token, self._base, self._per_row, self._kv = solution
        self.correction = Correction()

    def forward(self, rows: Floats, context_of_row: float) -> Floats:
        per_row = self._per_row + self._kv * context_of_row
        seconds: Floats = (self._base + per_row * rows) * self.correction.factor(rows)
        seconds[rows == 0] = 0.0
        return seconds

    def call(
        self, rows_of_forwards: Sequence[int], num_catch_up_tokens: int, context_tokens: int
    ) -> float:
        if not rows_of_forwards:
            return 0.0
        rows = np.array(rows_of_forwards, dtype=np.float64)
        more = max(0, num_catch_up_tokens - rows_of_forwards[0])
        first = self._overhead + self._per_token * more
        forwards = self.forward(rows, context_tokens / rows[0]).sum()
        return float(forwards + first * self.correction.factor(rows[:1])[0])


def isotonic(values: Floats) -> Floats:
    """Return the nearest non-decreasing sequence, by pooling adjacent violators.

    Source: Barlow et al. 1972, Statistical Inference under Order Restrictions.
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((float(value), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return np.repeat([value for value, _ in pools], [count for _, count in pools])


def _non_negative_least_squares(matrix: Floats, values: Floats, sweeps: int = 2000) -> list[float]:
    """Solve for coefficients of at least 0, by coordinate descent."""
    solution = np.zeros(matrix.shape[1])
    squares = np.maximum((matrix * matrix).sum(axis=0), 1e-300)
    residual = values.astype(np.float64)
    for _ in range(sweeps):
        for j in range(len(solution)):
            new = max(0.0, solution[j] + matrix[:, j] @ residual / squares[j])
            residual -= matrix[:, j] * (new - solution[j])
            solution[j] = new
    return [float(x) for x in solution]
