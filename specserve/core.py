"""The step: schedule -> draft -> select -> verify -> commit. The file to read first."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from specserve.batch import Batch, Decision, Draft, StepRecord
from specserve.engines import TargetEngine, isolated
from specserve.engines.guarded import GuardedDraftEngine
from specserve.pacing import Pacer
from specserve.policies import Policy
from specserve.scheduler import Scheduler, StepOutput
from specserve.stats import Stats
from specserve.telemetry.state import NoTelemetry, Telemetry
from specserve.trace import trace_of

T = TypeVar("T")
Clock = Callable[[], float]


class SpecServe:
    """One scheduler, one policy, two engines, one clock in seconds."""

    def __init__(
        self,
        scheduler: Scheduler,
        policy: Policy,
        draft_engine: GuardedDraftEngine,
        target_engine: TargetEngine,
        clock: Clock,
    ) -> None:
        self.scheduler = scheduler
        self.policy = policy
        self.draft_engine = draft_engine
        self.target_engine = target_engine
        self.clock = clock
        self.take_arrivals: Callable[[], None] = lambda: None  # submits who has come meanwhile
        self.telemetry: Telemetry = NoTelemetry()
        self.stats = Stats()

    def use(self, policy: Policy, pacer: Pacer | None) -> None:
        """Change the policy and what paces the scheduler, between steps."""
        self.policy = self.scheduler.policy = policy
        self.scheduler.pacer = pacer

    def step(self) -> list[StepOutput]:
        """Advance every scheduled request; return what each of them got."""
        started = self.clock()
        if self.draft_engine.take_lost_kv():
            self.scheduler.forget_draft_kv()
        batch = self.scheduler.schedule(started)  # base tokens for every row; a draft plan
        self.release_ended()
        drafts, draft_s = self._timed(lambda: self._draft(batch))
        chosen = self._select(batch, drafts)  # which draft tokens the target will look at
        num_joined = self._let_join(batch, drafts, chosen)  # who came while the others drafted
        outputs, verify_s = self._timed(lambda: isolated.verify(self.target_engine, batch, chosen))
        now = self.clock()
        results = self.scheduler.commit(batch, drafts, chosen, outputs, now)
        counted = getattr(self.target_engine, "num_computed_tokens", None)
        record = StepRecord(batch, drafts, chosen, outputs, draft_s, verify_s, counted, num_joined)
        decision = self.policy.decision.joined_by(num_joined)
        self._explain(record, decision, results, now)
        self.policy.observe(record)
        self.stats.add(record, decision, self.clock() - started)
        return results

    def _timed(self, call: Callable[[], T]) -> tuple[T, float]:
        started = self.clock()
        result = call()
        return result, self.clock() - started

    def _draft(self, batch: Batch) -> list[Draft]:
        """Take what prompt lookup proposes, and the draft model's proposals for the other rows."""
        drafts = self.draft_engine.draft(batch)
        return [row.lookup or draft for row, draft in zip(batch.rows, drafts, strict=True)]

    def _select(self, batch: Batch, drafts: Sequence[Draft]) -> list[list[int]]:
        """Cut each draft to the length the policy chose without having seen its tokens."""
        lengths = self.policy.select(batch, [draft.confidences for draft in drafts])
        return [draft.token_ids[:n] for draft, n in zip(drafts, lengths, strict=True)]

    def _let_join(self, batch: Batch, drafts: list[Draft], chosen: list[list[int]]) -> int:
        """Add the prompts of those who have come while the others drafted; return how many."""
        self.take_arrivals()
        num_tokens = batch.num_base_tokens + sum(map(len, chosen))
        rows = self.scheduler.join(num_tokens, self.clock())
        batch.rows += rows
        drafts += [Draft() for _ in rows]
        chosen += [[] for _ in rows]
        return len(rows)

    def _explain(
        self,
        record: StepRecord,
        decision: Decision,
        results: Sequence[StepOutput],
        now: float,
    ) -> None:
        """Note what the step did in the traces of the requests that want one."""
        rows = {row.key: i for i, row in enumerate(record.batch.rows)}
        for request in (output.request for output in results):
            if request.trace is not None:
                at_s = now - request.arrival_s
                index = rows[request.key]
                request.trace.append(trace_of(record, decision, index, at_s))

    def release_ended(self) -> None:
        """Let go of what is kept for requests that have ended."""
        keys = self.scheduler.take_released()
        if keys:
            self.draft_engine.release(keys)
            self.target_engine.release(keys)
            self.policy.release(keys)
