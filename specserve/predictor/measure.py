"""`specserve profile`: time the running engines through the interface that serves."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from specserve.batch import Batch, Row
from specserve.block_manager import BlockManager
from specserve.engines import DraftEngine, EngineInfo, TargetEngine
from specserve.predictor.profile import DraftSample, Profile, VerifySample

# Every small one: kernels for a CPU work on a few rows at a time, and between 4 and 5 tokens a
# verification without AVX-512 becomes half as long again.
VERIFY_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128)
# A change of shape costs OpenVINO some milliseconds on a model of 24 layers: a tenth of a step of
# one token, and plain decoding, whose steps are alike, has none. Small sizes are timed twice, after
# another and after themselves, which tells the two apart.
REPEATED_SIZES = 16
PROMPT_SIZES = (32, 128)
DRAFT_ROWS = (1, 2, 4, 8, 16, 32)
DRAFT_LENGTHS = (1, 4, 8)
CHUNK = 128


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure.

    Attributes:
        num_rounds: every point is timed once a round, so that a slow moment spreads over all.
        num_rows: rows to spread tokens over.
        context_tokens: cached tokens of a row, one pass for each.
        max_fill_tokens: cached tokens of all rows of a pass, which take as long as prompts do.
        budget_s: of all passes alike; each has two rounds at least, the first to warm up.
    """

    num_rounds: int = 5
    num_rows: int = 32
    context_tokens: tuple[int, ...] = (64, 512)
    max_fill_tokens: int = 4096
    budget_s: float = 80.0


QUICK = Effort(num_rounds=2, num_rows=16, context_tokens=(16, 160), budget_s=10.0)


def measure(
    draft: DraftEngine,
    target: TargetEngine,
    info: EngineInfo,
    fingerprint: dict[str, str],
    effort: Effort = QUICK,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Time verification and drafting over sizes, rows and contexts, on real block tables.

    The rows' contexts are filled by the engines first: an attention over blocks that nobody wrote
    stays in the cache and looks cheaper than it is.
    """
    bench = _Bench(draft, target, info, clock)
    times: dict[VerifySample | DraftSample, list[float]] = {}
    changes: list[float] = []
    for context in effort.context_tokens:
        end = clock() + effort.budget_s / len(effort.context_tokens)
        rows = bench.fill(context, min(effort.num_rows, max(1, effort.max_fill_tokens // context)))
        for round_ in range(effort.num_rounds + 1):
            if round_ > 1 and clock() > end:
                break
            for point, first_s, again_s in _points(bench, rows, context):
                if round_ == 0:
                    continue  # it warms up
                times.setdefault(point, []).append(first_s if again_s is None else again_s)
                if again_s is not None:
                    changes.append(first_s - again_s)
        bench.release(rows)
    change_s = max(0.0, float(np.median(changes)))
    typical = {point: _unchanged(point, values, change_s) for point, values in times.items()}
    return Profile(
        fingerprint=fingerprint,
        verify=tuple(
            VerifySample(p.num_tokens, p.num_logit_rows, p.context_tokens, t)
            for p, t in typical.items()
            if isinstance(p, VerifySample)
        ),
        draft=tuple(
            DraftSample(p.num_rows, p.num_forwards, p.num_catch_up_tokens, p.context_tokens, t)
            for p, t in typical.items()
            if isinstance(p, DraftSample)
        ),
        change_s=change_s,
    )


def _unchanged(
    point: VerifySample | DraftSample, seconds: Sequence[float], change_s: float
) -> float:
    """Return the lower quartile, without the change of shape where it was in every sample."""
    typical = float(np.percentile(seconds, 25))
    if isinstance(point, VerifySample) and point.num_tokens > REPEATED_SIZES:
        return max(typical - change_s, 0.5 * typical)
    return typical


def _points(
    bench: "_Bench", rows: Sequence[Row], context: int
) -> Iterator[tuple[VerifySample | DraftSample, float, float | None]]:
    """Time every point, small verifications twice; the samples are keys, without seconds."""
    for size in bench.verify_sizes:
        num_rows = min(len(rows), max(1, size // 3))
        seconds = bench.verify(rows[:num_rows], size)
        again_s = bench.verify(rows[:num_rows], size) if size <= REPEATED_SIZES else None
        yield VerifySample(size, size, num_rows * context, 0.0), seconds, again_s
    for size in PROMPT_SIZES:
        yield VerifySample(size, 0, context, 0.0), bench.prompt(rows[0], size), None
    for num_rows in DRAFT_ROWS:
        if num_rows > len(rows):
            break
        for length in DRAFT_LENGTHS:
            seconds = bench.draft(rows[:num_rows], length, 1)
            yield DraftSample(num_rows, length, num_rows, num_rows * context, 0.0), seconds, None
    for catch_up in (16, min(context, 128)):
        seconds = bench.draft(rows[:1], 1, catch_up)
        yield DraftSample(1, 1, catch_up, context, 0.0), seconds, None


class _Bench:
    """Rows of its own on the engines of a server that has no requests yet."""

    def __init__(
        self,
        draft: DraftEngine,
        target: TargetEngine,
        info: EngineInfo,
        clock: Callable[[], float],
    ) -> None:
        self._draft, self._target, self._info, self._clock = draft, target, info, clock
        self._blocks = BlockManager(info.num_blocks, info.block_size)
        self._random = np.random.default_rng(0)
        self._next_key = -1
        steps = info.captured_sizes
        self.verify_sizes = sorted({*VERIFY_SIZES, *steps, *(size + 1 for size in steps[:-1])})

    def fill(self, context: int, num_rows: int) -> list[Row]:
        """Make rows with `context` tokens of real KV in both engines, `num_rows` if they fit."""
        rows: list[Row] = []
        spare = max(PROMPT_SIZES)
        while len(rows) < num_rows:
            row = Row(self._next_key, 0, [], False, [], context)
            if not self._blocks.extend(row.block_table, context + spare):
                break
            self._next_key -= 1
            for start in range(0, context, CHUNK):
                row.num_computed_tokens = start
                row.token_ids = self._tokens(min(CHUNK, context - start))
                self._target.verify(Batch([row]), [[]])
            row.num_computed_tokens = context
            row.max_draft_tokens, row.catch_up_token_ids = 1, self._tokens(context)
            self._draft.draft(Batch([row]))
            rows.append(row)
        assert rows, f"{self._info.num_blocks} KV blocks do not hold one row of {context} tokens"
        return rows

    def verify(self, rows: Sequence[Row], size: int) -> float:
        """Time a verification of `size` tokens, spread over the rows."""
        chosen = []
        for i, row in enumerate(rows):
            row.token_ids, row.samples = self._tokens(1), True
            chosen.append(self._tokens(size // len(rows) - 1 + (i < size % len(rows))))
        return self._time(lambda: self._target.verify(Batch(list(rows)), chosen))

    def prompt(self, row: Row, size: int) -> float:
        """Time a prompt chunk that samples nothing, or only after its last token."""
        row.token_ids, row.samples = self._tokens(size), not self._info.takes_chunks
        return self._time(lambda: self._target.verify(Batch([row]), [[]]))

    def draft(self, rows: Sequence[Row], length: int, num_catch_up_tokens: int) -> float:
        """Time a draft call of `length` forwards of all rows, after a pass of the target.

        As in a step: the caches hold what the target has just read, so the first forward is slow.
        """
        self.verify(rows[:1], 1)
        for row in rows:
            row.max_draft_tokens = length
            row.num_draft_computed_tokens = row.num_computed_tokens - num_catch_up_tokens + 1
            row.catch_up_token_ids = self._tokens(num_catch_up_tokens)
        return self._time(lambda: self._draft.draft(Batch(list(rows))))

    def release(self, rows: Sequence[Row]) -> None:
        """Give everything back."""
        keys = [row.key for row in rows]
        self._draft.release(keys)
        self._target.release(keys)
        for row in rows:
            self._blocks.release(row.block_table)

    def _tokens(self, count: int) -> list[int]:
        token_ids: list[int] = self._random.integers(0, self._info.vocab_size, count).tolist()
        return token_ids

    def _time(self, call: Callable[[], object]) -> float:
        started = self._clock()
        call()
        return self._clock() - started
