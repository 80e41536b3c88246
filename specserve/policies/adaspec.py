"""AdaSpec: as its code was released, and repaired to what we read as its intent.

Huang et al., "SpecServe" (arXiv 2503.05096 v1), "AdaSpec" in v2 (SoCC'25); code
cerebellumking/AdaSpec@f3f2f48, vllm/spec_decode/draft_model_runner.py. Three parts: a gate and an
adaptive drafter, which choose one draft length for the batch by predicted rate (`baseline_rules`);
a confidence prior verifier, which drops draft tokens down to a CUDA-graph size (here).

Faults of the policy are kept in `adaspec_released`; faults of its runtime are not: the draft's KV
is caught up after skipped steps, the target reads its context once, and step times come from the
predictor that all policies share, in which a forward includes head and sampler.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Batch, DraftPlan, Row, StepRecord
from specserve.config import PolicyConfig
from specserve.policies import Unexplained, needed
from specserve.policies.baseline_costs import Floats, StepCosts, adaptive_caps, plan_caps
from specserve.policies.baseline_rules import (
    BestLengthRule,
    BestLengthStopper,
    GoodputRule,
    GoodputStopper,
    Lengths,
)
from specserve.predictor.step_time import StepTimeModel

NEEDS_PROFILE = True

Products = list[list[float]]  # of each adaptive row, the running product of its confidences


def make(
    config: PolicyConfig, step_time: StepTimeModel | None = None
) -> "AdaSpecReleased | AdaSpecRepaired":
    """Make `adaspec_released` or `adaspec_repaired` on a predictor."""
    if config.slo_tpot_s <= 0.0:
        raise ValueError(f"policy.slo_tpot_s is {config.slo_tpot_s}: must be above 0")
    predictor = needed(step_time, config.name)
    if config.name == "adaspec_repaired":
        return AdaSpecRepaired(predictor, config.max_draft_tokens, config.slo_tpot_s)
    slo_s = config.slo_tpot_s if config.slo_check else float("inf")
    return AdaSpecReleased(predictor, config.max_draft_tokens, slo_s)


class AdaSpecReleased(Unexplained):
    """The released code: gate, hill climbing (D5), elimination from one row (D2), one total (D3).

    The prior is the mean of every confidence recorded since the start (D8), and of steps that did
    not get worse only; while the gate is closed nothing is drafted, so it cannot reopen (D9).

    Args:
        slo_s: the commented check: a step longer than this may not speculate (D1); inf for none.
    """

    def __init__(
        self, step_time: StepTimeModel, max_draft_tokens: int, slo_s: float = float("inf")
    ) -> None:
        self.step_time = step_time
        self.max_draft_tokens = max_draft_tokens
        self.slo_s = slo_s
        self._total = 0.0
        self._count = 0.0

    def plan(self, rows: Sequence[Row]) -> DraftPlan:
        """Let all rows draft, or none; the rule stops them together."""
        caps = adaptive_caps(rows, self.max_draft_tokens)
        if not caps.any():
            return DraftPlan(plan_caps(rows, caps))
        costs = StepCosts.of(self.step_time, rows, self.max_draft_tokens)
        rule = GoodputRule(
            caps.astype(np.float64),
            costs.verify_s,
            costs.forward_s,
            np.array([self._total, self._count]),
            np.array([costs.base_yield, costs.call_s, self.slo_s, np.inf]),
        )
        if rule.start().opens():
            return DraftPlan(plan_caps(rows, caps), rule)
        return DraftPlan(plan_caps(rows, np.zeros_like(caps)))

    def select(self, batch: Batch, confidences: Sequence[Sequence[float]]) -> list[int]:
        """Eliminate down to the next smaller graph size, if the rate does not fall by it."""
        rule, lengths = batch.stop_rule, [len(values) for values in confidences]
        if not isinstance(rule, GoodputRule) or not any(lengths):
            return lengths
        stopper = rule.start()
        for rows, newest in forwards(batch, confidences):
            stopper.goes_on(rows, newest)
        self._total, self._count = stopper.total, stopper.count
        products = running_products(batch, confidences)
        num_tokens = batch.num_base_tokens + sum(lengths)
        kept = eliminate_as_released(products, num_tokens - smaller_graph(num_tokens))
        if self._rate(stopper, products, kept) >= stopper.goodput:
            return _with_fixed(batch, lengths, kept)
        return lengths

    @staticmethod
    def _rate(stopper: GoodputStopper, products: Products, kept: list[int]) -> float:
        draft_s = stopper.priced_draft_s - (0.0 if any(kept) else stopper.call_s)
        step_s = draft_s + float(stopper.rule.verify_s[sum(kept)])
        tokens: float = stopper.base_yield
        tokens += sum(sum(row[:n]) for row, n in zip(products, kept, strict=True))
        return tokens / step_s

    def observe(self, record: StepRecord) -> None:
        """Learn nothing from verification (D8); the prior was recorded with the draft."""

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept for a request."""


class AdaSpecRepaired(Unexplained):
    """What we read as the intent of the released code.

    * The drafter compares what is at hand with the *best* longer draft, not the next one.
    * The verifier removes the globally smallest products, tries every graph size, prices what was
      drafted, and drops a last token that made the step worse.
    * The prior is the mean of the last 1000 confidences, and 1 % of the gated steps draft anyway.
    * The SLO is per row: T / E_i <= slo; if no length keeps it, the smallest worst T / E_i wins.

    Not added, as it is not theirs: calibration, deadlines per request, prefill and admission.

    Args:
        slo_s: the TPOT that every row is to keep; inf for none.
    """

    WINDOW = 1000
    EXPLORE_EVERY = 100  # gated steps

    def __init__(
        self, step_time: StepTimeModel, max_draft_tokens: int, slo_s: float = float("inf")
    ) -> None:
        self.step_time = step_time
        self.max_draft_tokens = max_draft_tokens
        self.slo_s = slo_s
        self._recent: deque[float] = deque(maxlen=self.WINDOW)
        self._num_gated = 0

    def plan(self, rows: Sequence[Row]) -> DraftPlan:
        """Let all rows draft, or none; the rule stops them together."""
        caps = adaptive_caps(rows, self.max_draft_tokens)
        if not caps.any():
            return DraftPlan(plan_caps(rows, caps))
        rule = self._rule(rows, caps.astype(np.float64))
        if rule.start().opens() or self._explores():
            return DraftPlan(plan_caps(rows, caps), rule)
        return DraftPlan(plan_caps(rows, np.zeros_like(caps)))

    def _rule(self, rows: Sequence[Row], caps: Floats) -> BestLengthRule:
        costs = StepCosts.of(self.step_time, rows, self.max_draft_tokens)
        decodes_plainly = any(
            row.samples and len(row.token_ids) == 1 and not cap and not row.has_fixed_draft
            for row, cap in zip(rows, caps, strict=True)
        )
        return BestLengthRule(
            caps,
            costs.verify_s,
            costs.forward_s,
            np.array([sum(self._recent), float(len(self._recent))]),
            np.array(
                [costs.base_yield, costs.call_s, self.slo_s, 1.0 if decodes_plainly else np.inf]
            ),
        )

    def _explores(self) -> bool:
        self._num_gated += 1
        return self._num_gated % self.EXPLORE_EVERY == 0

    def select(self, batch: Batch, confidences: Sequence[Sequence[float]]) -> list[int]:
        """Verify the best of: every common length, and the best tokens of every graph size."""
        rule, lengths = batch.stop_rule, [len(values) for values in confidences]
        if not isinstance(rule, BestLengthRule) or not any(lengths):
            return lengths
        stopper = rule.start()
        for rows, newest in forwards(batch, confidences):
            stopper.add(rows, newest)
        products = running_products(batch, confidences)
        candidates = list(self._candidates(products, _unchosen_tokens(batch, lengths)))
        worths = stopper.worths(_as_lengths(candidates, products, stopper))
        best = max(range(len(candidates)), key=worths.__getitem__)
        return _with_fixed(batch, lengths, candidates[best])

    @staticmethod
    def _candidates(products: Products, num_base_tokens: int) -> Iterator[list[int]]:
        """Return lengths to try; of equals, elimination comes first, as in the source."""
        num_drafted = sum(len(row) for row in products)
        size = smaller_graph(num_base_tokens + num_drafted)
        while size > num_base_tokens:
            yield keep_largest(products, size - num_base_tokens)
            size = smaller_graph(size)
        for k in range(max(len(row) for row in products), -1, -1):
            yield [min(len(row), k) for row in products]

    def observe(self, record: StepRecord) -> None:
        """Record the confidences; verification is not learnt from (D8)."""
        for row, draft in zip(record.batch.rows, record.drafts, strict=True):
            if not row.has_fixed_draft:
                self._recent.extend(draft.confidences)

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept for a request."""


# -- the verifier's parts ----------------------------------------------------------------------


def smaller_graph(num_tokens: int) -> int:
    """Return the largest captured size below: powers of two up to 32, then multiples of 32."""
    if num_tokens <= 1:
        return 0
    if num_tokens <= 32:
        return 1 << ((num_tokens - 1).bit_length() - 1)
    return (num_tokens - 1) // 32 * 32


def eliminate_as_released(products: Products, num_tokens: int) -> list[int]:
    """Shorten, token by token, the row whose *whole* draft is the least likely.

    The source compares the last entries of lists that it never pops, so one row is stripped to
    nothing before the next is touched (D2). Unlike the source it ends when nothing is left (D20).
    """
    lengths = [len(row) for row in products]
    for _ in range(num_tokens):
        rows = [i for i, length in enumerate(lengths) if length]
        if not rows:
            break
        lengths[min(rows, key=lambda i: products[i][-1])] -= 1
    return lengths


def keep_largest(products: Products, num_tokens: int) -> list[int]:
    """Keep the largest products, of equals the earliest positions: a prefix of each row."""
    order = sorted(
        (-product, position, i)
        for i, row in enumerate(products)
        for position, product in enumerate(row)
    )
    rows = [i for _, _, i in order[:num_tokens]]
    return [rows.count(i) for i in range(len(products))]


def running_products(batch: Batch, confidences: Sequence[Sequence[float]]) -> Products:
    """Return the running product of each row's confidences; none where the length is fixed."""
    return [
        [] if row.has_fixed_draft else np.cumprod(values).tolist()
        for row, values in zip(batch.rows, confidences, strict=True)
    ]


def forwards(
    batch: Batch, confidences: Sequence[Sequence[float]]
) -> Iterator[tuple[NDArray[np.int64], Floats]]:
    """Return what each draft forward gave the rows of no fixed length: rows, confidences."""
    adaptive = [i for i, row in enumerate(batch.rows) if not row.has_fixed_draft]
    for position in range(max((len(confidences[i]) for i in adaptive), default=0)):
        rows = [i for i in adaptive if len(confidences[i]) > position]
        yield np.array(rows), np.array([confidences[i][position] for i in rows])


def _as_lengths(
    candidates: Sequence[Sequence[int]], products: Products, stopper: BestLengthStopper
) -> Lengths:
    """Price candidates as what they are: a part of a draft that has been paid for in full."""
    yields = np.array(
        [
            [1.0 + sum(row[:n]) for row, n in zip(products, lengths, strict=True)]
            for lengths in candidates
        ]
    )
    tokens = stopper.base_yield + (yields - 1.0).sum(axis=1)
    return Lengths(
        np.array([sum(lengths) for lengths in candidates]),
        tokens,
        stopper.least(yields),
        np.full(len(candidates), stopper.spent_s),
    )


def _unchosen_tokens(batch: Batch, lengths: Sequence[int]) -> int:
    """Count what is verified in any case: base tokens, and drafts of fixed length."""
    fixed = sum(n for row, n in zip(batch.rows, lengths, strict=True) if row.has_fixed_draft)
    return batch.num_base_tokens + fixed


def _with_fixed(batch: Batch, lengths: Sequence[int], kept: Sequence[int]) -> list[int]:
    return [
        length if row.has_fixed_draft else n
        for row, length, n in zip(batch.rows, lengths, kept, strict=True)
    ]
