"""`specserve profile`: time the running engines through the interface that serves."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from specserve.batch import Batch, Row
from specserve.block_manager import BlockManager
from specserve.engines import DraftEngine, EngineInfo, TargetEngine
from specserve.predictor.acceptance import JUDGE_COEFFICIENTS, SCOUT_COEFFICIENTS
from specserve.predictor.profile import MORE_S, DraftSample, Profile, VerifySample
from specserve.stop_rules import ValueRule

# Every small one: kernels for a CPU work on a few rows at a time, and between 4 and 5 tokens a
# verification without AVX-512 becomes half as long again. Of the larger ones, both sides of the
# steps of oneDNN's products in bf16, one every 64 tokens: 65 take half as long again as 64.
VERIFY_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 65, 128, 129)
PROMPT_SIDES = (192, 193, 256, 257)  # measured with one context only: they take long
# A change of shape costs OpenVINO some milliseconds on a model of 16 layers: a tenth of a step of
# one token, and plain decoding, whose steps are alike, has none. Measured on the sizes up to this
# one; beside larger ones it is lost in what disturbs them.
CHANGED_SIZES = 16
# A prompt comes after passes of another size, and most often in a size of its own, which OpenVINO
# makes kernels for: 3 to 10 ms at 0.4 G parameters. So every one is a token shorter than the last.
PROMPT_SIZES = (16, 64, 128, 256)
DRAFT_ROWS = (1, 2, 4, 8, 16, 32)
DRAFT_LENGTHS = (1, 4, 8)
DRAFT_CATCH_UPS = (16, 128)
POINTS = (
    VERIFY_SIZES, PROMPT_SIDES, CHANGED_SIZES, PROMPT_SIZES,
    DRAFT_ROWS, DRAFT_LENGTHS, DRAFT_CATCH_UPS, MORE_S,
)  # fmt: skip
CHUNK = SPARE = 128  # tokens of a prompt that fills a row, and of room behind its context
Timed = tuple[VerifySample | DraftSample, float]  # the sample is a key, without seconds


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure.

    Attributes:
        num_rounds: every point is timed once a round, so that a slow moment spreads over all.
        num_rows: rows to spread tokens over.
        context_tokens: cached tokens of a row; every point is timed with all of them in turn, or a
            slow moment would pass for what context costs.
        max_fill_tokens: cached tokens of all rows of one context: they take as long as prompts do.
        budget_s: of the rounds; there are two at least.
    """

    num_rounds: int = 5
    num_rows: int = 32
    context_tokens: tuple[int, ...] = (32, 256)
    max_fill_tokens: int = 4096
    budget_s: float = 50.0

    def rows_of(self, context: int) -> int:
        """Return how many rows of such a context to fill."""
        return min(self.num_rows, max(1, self.max_fill_tokens // context))


QUICK = Effort(num_rounds=2, num_rows=16, context_tokens=(16, 160), budget_s=10.0)


def points_mark() -> str:
    """Return a mark of what is measured, which a profile of an older version does not have."""
    return hashlib.sha256(repr(POINTS).encode()).hexdigest()[:8]


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
    filled = bench.fill_all(effort)
    times: dict[VerifySample | DraftSample, list[float]] = {}
    changes, draft_changes = list[float](), list[float]()
    end = clock() + effort.budget_s
    for round_ in range(effort.num_rounds):
        if round_ > 1 and clock() > end:
            break
        if round_ == 1:
            changes.clear()  # those of the first round had kernels to compile
            draft_changes.clear()
        points: Iterable[Timed] = chain(
            _verifications(bench, filled, changes),
            _prompts(bench, filled, round_),
            _drafts(bench, filled, draft_changes),
        )
        for point, seconds in points:
            times.setdefault(point, []).append(seconds)
    for one in filled:
        bench.release(one.rows)
    typical = {point: float(np.percentile(values, 25)) for point, values in times.items()}
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
        change_s=max(0.0, float(np.median(changes))),
        draft_change_s=max(0.0, float(np.median(draft_changes))),
    )


class _Filled(NamedTuple):
    """Rows with so many tokens of context each."""

    context: int
    rows: list[Row]


def _verifications(
    bench: "_Bench", filled: Sequence[_Filled], changes: list[float]
) -> Iterator[Timed]:
    """Time every verification after another of its size.

    Args:
        changes: gets how much longer one took that came after one of another size.
    """
    for size in bench.verify_sizes:
        if size > SPARE * bench.num_rows(filled[0].rows, size):
            break  # a small KV cache holds too few rows for so many tokens
        changed_s = bench.verify(filled[0].rows, size)
        for i, (context, rows) in enumerate(filled[: 1 if size in PROMPT_SIDES else None]):
            seconds = bench.verify(rows, size)
            yield VerifySample(size, size, bench.num_rows(rows, size) * context, 0.0), seconds
            if i == 0 and size <= CHANGED_SIZES:
                changes.append(changed_s - seconds)


def _prompts(bench: "_Bench", filled: Sequence[_Filled], round_: int) -> Iterator[Timed]:
    """Time prompts as they come: in a size that was not there yet, after a verification."""
    for longest in PROMPT_SIZES:
        for i, (context, rows) in enumerate(filled):
            size = longest - round_ * len(filled) - i
            if bench.holds(rows[0], context + size):
                bench.verify(rows, 1)
                yield VerifySample(size, 0, context, 0.0), bench.prompt(rows[0], size)


def _drafts(bench: "_Bench", filled: Sequence[_Filled], changes: list[float]) -> Iterator[Timed]:
    """Time every draft call after another of its shape.

    Args:
        changes: gets how much longer a forward took that came after one of another size.
    """
    calls = [(num_rows, length, 1) for num_rows in DRAFT_ROWS for length in DRAFT_LENGTHS]
    calls += [(1, 1, num_catch_up) for num_catch_up in DRAFT_CATCH_UPS]
    for num_rows, length, num_catch_up in calls:
        for context, rows in filled:
            if num_rows <= len(rows) and num_catch_up <= context:
                changed_s = bench.draft(rows[:num_rows], length, num_catch_up)
                seconds = bench.draft(rows[:num_rows], length, num_catch_up)
                if length == num_catch_up == 1 and context == filled[0].context:
                    changes.append(changed_s - seconds)
                tokens = num_rows * num_catch_up
                yield DraftSample(num_rows, length, tokens, num_rows * context, 0.0), seconds


def _always(num_rows: int, length: int) -> ValueRule:
    """Return the rule that serves, with rows that go on whatever it finds."""
    return ValueRule(
        judge=np.zeros(JUDGE_COEFFICIENTS * num_rows),
        scout=np.zeros(SCOUT_COEFFICIENTS * num_rows),
        weight=np.full(num_rows, np.inf),
        verify_s=np.ones(num_rows * length + 1),
        forward_s=np.zeros(num_rows + 1),
        gains=np.empty(0),
        base=np.array([float(num_rows), 0.0, 1.0]),
    )


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
        self.verify_sizes = sorted(
            {*VERIFY_SIZES, *PROMPT_SIDES, *steps, *(size + 1 for size in steps[:-1])}
        )

    def fill_all(self, effort: Effort) -> list[_Filled]:
        """Make the rows of every context, each in its share of the blocks; of one at least."""
        share = self._info.num_blocks // len(effort.context_tokens)
        filled = []
        for context in effort.context_tokens:
            fitting = share // self._blocks_of(context)
            rows = self.fill(context, min(effort.rows_of(context), max(1, fitting)))
            if rows:
                filled.append(_Filled(context, rows))
        assert filled, f"{self._info.num_blocks} KV blocks do not hold one row to measure with"
        return filled

    def _blocks_of(self, context: int) -> int:
        return -(-(context + SPARE) // self._info.block_size)

    def holds(self, row: Row, num_tokens: int) -> bool:
        """Make room for so many tokens of a row, if there is."""
        return self._blocks.extend(row.block_table, num_tokens)

    def fill(self, context: int, num_rows: int) -> list[Row]:
        """Make rows with `context` tokens of real KV in both engines, `num_rows` if they fit."""
        rows: list[Row] = []
        while len(rows) < num_rows:
            row = Row(self._next_key, 0, [], False, [], context)
            if not self._blocks.extend(row.block_table, context + SPARE):
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
        return rows

    def num_rows(self, rows: Sequence[Row], size: int) -> int:
        """Return how many of the rows share a verification of `size` tokens: two for each.

        On a CPU attention is dear for every token that looks back, not for every row alone; so a
        few rows with many tokens would make the context of plain decoding look dear.
        """
        return min(len(rows), max(1, size // 2))

    def verify(self, rows: Sequence[Row], size: int) -> float:
        """Time a verification of `size` tokens, spread over some of the rows."""
        rows = rows[: self.num_rows(rows, size)]
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

        As in a step: the caches hold what the target has just read, so the first forward is slow,
        and a rule is asked after each whether to go on.
        """
        self.verify(rows[:1], 1)
        rule = _always(len(rows), length)
        for row in rows:
            row.max_draft_tokens = length
            row.num_draft_computed_tokens = row.num_computed_tokens - num_catch_up_tokens + 1
            row.catch_up_token_ids = self._tokens(num_catch_up_tokens)
        return self._time(lambda: self._draft.draft(Batch(list(rows), stop_rule=rule)))

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
