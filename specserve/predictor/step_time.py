"""How long a step takes: theory, times a measured staircase, times what serving has taught since.

Owns the prediction of draft and verification time and its error. Decides nothing.
"""

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specserve.predictor.profile import DraftSample, Profile, VerifySample
from specserve.predictor.prompts import NO_PROMPTS, Prompts, PromptTime
from specserve.predictor.roofline import Prior, Roofline
from specserve.telemetry.state import NEUTRAL, DeviceState, NoTelemetry, Telemetry

Floats = NDArray[np.float64]


REFRESH_EVERY = 8  # observations


class StepTimeModel:
    """Predicts T(draft forwards, target tokens, context tokens) in seconds.

    verify(n, c) = (roofline(n, c; device state) * staircase(n) + `PromptTime`) * correction(n);
    `change_curve` is what another n than the last adds. draft = call overhead + one time per
    forward, by the rows still drafting, + one per forward of another size than the last.
    The device's state counts relative to that in which the profile was taken.

    Attributes:
        host_s: of a step, beside both.
    """

    def __init__(self, profile: Profile, telemetry: Telemetry | None = None) -> None:
        self.telemetry: Telemetry = telemetry or NoTelemetry()
        self._profiled_clocks = profile.clocks
        self._state = NEUTRAL
        self._verify = _VerifyTime(profile.verify, Prior.of(profile.fingerprint))
        self._draft = _DraftTime(profile.draft)
        self._cache: dict[tuple[int, ...], Floats] = {}
        self._num_observed = 0
        self._change_s = profile.change_s
        self._last_num_tokens = 0
        self._draft_change_s = profile.draft_change_s
        self._last_draft_size = 0
        self.host_s = profile.host_s

    def verify_curve(
        self,
        num_tokens: int,
        num_more: int,
        context_tokens: int,
        prompts: Prompts = NO_PROMPTS,
    ) -> Floats:
        """Predict verification of num_tokens, num_tokens + 1, ..., num_tokens + num_more tokens.

        Args:
            num_tokens: target tokens of the step, at least 1, prompt tokens included.
            context_tokens: cached tokens that all rows read, together.
            prompts: of num_tokens, those of prompts; with them comes the change of shape that they
                bring about.

        Returns:
            [num_more + 1] seconds; never falls.
        """
        state = self._follow_device()
        context_tokens = _rounded(context_tokens)
        key = (num_tokens, num_more, context_tokens, *prompts)
        if key not in self._cache:
            n = np.arange(num_tokens, num_tokens + num_more + 1, dtype=np.float64)
            self._cache[key] = self._verify.predict(n, context_tokens, prompts, state)
        return self._cache[key]

    def verify_s(
        self, num_tokens: int, context_tokens: int, prompts: Prompts = NO_PROMPTS
    ) -> float:
        """Predict one verification."""
        return float(self.verify_curve(num_tokens, 0, context_tokens, prompts)[0])

    def change_curve(
        self, num_tokens: int, num_more: int = 0, prompts: Prompts = NO_PROMPTS
    ) -> Floats:
        """Predict what verify_curve leaves out: the time that a change of shape takes.

        Returns:
            [num_more + 1] seconds; 0 for as many tokens as the last verification had, and with
            prompt tokens.
        """
        if prompts.num_tokens:
            return np.zeros(num_more + 1)
        curve = np.full(num_more + 1, self._change_s)
        if 0 <= self._last_num_tokens - num_tokens <= num_more:
            curve[self._last_num_tokens - num_tokens] = 0.0
        return curve

    def has_verified(self, num_tokens: int) -> None:
        """Remember the shape of a verification."""
        self._last_num_tokens = num_tokens

    def forward_curve(self, num_rows: int, context_tokens: int = 0) -> Floats:
        """Predict one more draft forward of 0, 1, ..., num_rows rows.

        Args:
            context_tokens: cached tokens of all num_rows rows; fewer rows read their share.

        Returns:
            [num_rows + 1] seconds.
        """
        state = self._follow_device()
        context_tokens = _rounded(context_tokens)
        key = (num_rows, context_tokens)
        if key not in self._cache:
            rows = np.arange(num_rows + 1, dtype=np.float64)
            self._cache[key] = self._draft.forward(rows, context_tokens / max(1, num_rows), state)
        return self._cache[key]

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
        if not rows_of_forwards:
            return 0.0
        state = self._follow_device()
        call = self._draft.call(rows_of_forwards, num_catch_up_tokens, context_tokens, state)
        return call + self._draft_change_s * self._num_changes(
            [max(num_catch_up_tokens, rows_of_forwards[0]), *rows_of_forwards[1:]]
        )

    def has_drafted(self, num_rows: int) -> None:
        """Remember the size of a draft call's last forward."""
        self._last_draft_size = num_rows

    def _num_changes(self, sizes: Sequence[int]) -> int:
        """Count the draft forwards that come after one of another size."""
        before = [self._last_draft_size, *sizes]
        return sum(size != last for last, size in zip(before, sizes, strict=False))

    def observe_verify(self, num_tokens: int, predicted_s: float, measured_s: float) -> None:
        """Learn one measured verification from what was predicted for it."""
        self._refresh()
        self.has_verified(num_tokens)
        self._verify.correction.observe(num_tokens, predicted_s, measured_s)

    def observe_draft(
        self, rows_of_forwards: Sequence[int], predicted_s: float, measured_s: float
    ) -> None:
        """Learn one measured draft call."""
        self._refresh()
        self.has_drafted(rows_of_forwards[-1])
        self._draft.correction.observe(rows_of_forwards[0], predicted_s, measured_s)

    def _follow_device(self) -> DeviceState:
        """Return the device's state; forget predictions made for another."""
        state = self.telemetry.read(self._profiled_clocks)
        if state is not self._state:
            self._state = state
            self._cache.clear()
        return state

    def _refresh(self) -> None:
        """Let predictions follow what was learnt, not after every step: they cost time too."""
        self._num_observed += 1
        if self._num_observed % REFRESH_EVERY == 0:
            self._cache.clear()

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
        self._local = [0.0] * 16  # by log2 of the size
        self._errors: deque[float] = deque(maxlen=self.WINDOW)

    def factor(self, sizes: Floats) -> Floats:
        """Return the factor for each size."""
        cells = np.log2(np.maximum(sizes, 1.0))
        value: Floats = np.exp(self._common + np.interp(cells, np.arange(16), self._local))
        return value

    def factor_of(self, size: int) -> float:
        """Return the factor for one size."""
        cell = min(math.log2(max(size, 1)), 14.0)
        low = int(cell)
        share = cell - low
        local = (1.0 - share) * self._local[low] + share * self._local[low + 1]
        return math.exp(self._common + local)

    def observe(self, size: int, predicted: float, measured: float) -> None:
        """Learn from one pair of predicted and measured seconds; no time says nothing."""
        if measured <= 0.0:
            return
        self._errors.append(abs(predicted - measured) / measured)
        error = max(-self.CLIP, min(self.CLIP, math.log(measured / predicted)))
        self._common += self.COMMON_RATE * error
        cell = min(math.log2(max(size, 1)), 14.0)
        low = int(cell)
        for index, weight in ((low, 1.0 - (cell - low)), (low + 1, cell - low)):
            self._local[index] += self.LOCAL_RATE * weight * error
        self._local = [0.999 * x for x in self._local]  # what all share belongs to the common part

    def error(self) -> tuple[float, float]:
        """Return median and 95th percentile of |predicted - measured| / measured."""
        if not self._errors:
            return 0.0, 0.0
        median, p95 = np.percentile(self._errors, (50, 95))
        return float(median), float(p95)


class _VerifyTime:
    """Roofline times staircase times correction."""

    def __init__(self, samples: Sequence[VerifySample], prior: Prior | None) -> None:
        full = [s for s in samples if s.num_logit_rows == s.num_tokens]
        self._roofline = Roofline.fit(
            [s.num_tokens for s in full],
            [s.context_tokens for s in full],
            [s.seconds for s in full],
            prior,
        )
        self._sizes, self._steps = self._staircase(full)
        self._prompt_time = self._prompts(samples)
        self.correction = Correction()

    def predict(self, n: Floats, context: float, prompts: Prompts, state: DeviceState) -> Floats:
        theory = self._roofline(n, context, state.compute_scale, state.memory_scale)
        stair = np.interp(np.log(n), np.log(self._sizes), self._steps)
        more = np.maximum(self._prompt_time(prompts) / state.compute_scale, -0.5 * theory)
        seconds: Floats = (theory * stair + more) * self.correction.factor(n)
        return lower_envelope(seconds)

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
        monotone = lower_envelope(np.array(ratios) * np.array(theory))
        return sizes, monotone / np.array(theory)

    def _prompts(self, samples: Sequence[VerifySample]) -> PromptTime:
        """Fit what measured prompts take more than as many tokens to verify."""
        prompts = [s for s in samples if s.num_logit_rows < s.num_tokens]
        n = np.array([s.num_tokens for s in prompts], dtype=np.float64)
        stair = np.interp(np.log(n), np.log(self._sizes), self._steps)
        full = stair * self._roofline(n, np.array([float(s.context_tokens) for s in prompts]))
        more = np.array([s.seconds for s in prompts]) - full
        chunks = [Prompts.chunk(s.num_tokens - s.num_logit_rows, s.context_tokens) for s in prompts]
        return PromptTime.fit(chunks, more, full)


class _DraftTime:
    """Catch-up tokens and forwards, each linear; kv per token of context in each forward.

    A forward reads the weights once and the cache of every row, and computes for every row.
    """

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

    def forward(self, rows: Floats, context_of_row: float, state: DeviceState) -> Floats:
        base, per_row = self._costs(context_of_row, state)
        seconds: Floats = (base + per_row * rows) * self.correction.factor(rows)
        seconds[rows == 0] = 0.0
        return seconds

    def call(
        self,
        rows_of_forwards: Sequence[int],
        num_catch_up_tokens: int,
        context_tokens: int,
        state: DeviceState,
    ) -> float:
        first_rows = rows_of_forwards[0]
        base, per_row = self._costs(context_tokens / first_rows, state)
        more = max(0, num_catch_up_tokens - first_rows)
        seconds = self._overhead + self._per_token * more / state.compute_scale
        seconds += len(rows_of_forwards) * base + per_row * sum(rows_of_forwards)
        return seconds * self.correction.factor_of(first_rows)

    def _costs(self, context_of_row: float, state: DeviceState) -> tuple[float, float]:
        """Return seconds of a forward, and of each row in it."""
        read_s = self._kv * context_of_row / state.memory_scale
        return self._base / state.memory_scale, self._per_row / state.compute_scale + read_s


def _rounded(context_tokens: int) -> int:
    """Round to some two percent, so that neighbouring steps ask for the same prediction."""
    step = max(32, 1 << max(0, context_tokens.bit_length() - 5))
    return -(-context_tokens // step) * step


def lower_envelope(values: Floats) -> Floats:
    """Return the largest non-decreasing sequence below `values`.

    What disturbs a measurement makes it longer, so of two that contradict each other the shorter
    one is right.
    """
    return np.minimum.accumulate(values[::-1])[::-1]


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
