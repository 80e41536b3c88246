"""Who runs in a step, with how many tokens, and what becomes of the result.

Owns the queues, the requests' counters and the block tables. Knows no tensors and no text; how much
to draft is the policy's decision, within the limits set here.
"""

from dataclasses import dataclass

from specserve.admission import Admission
from specserve.batch import Batch, Draft, DraftPlan, Row, Verified
from specserve.block_manager import BlockManager
from specserve.config import SchedulerConfig, SLOConfig
from specserve.lookup import PromptLookup
from specserve.pacing import AIM, Pacer, owed_tokens, slack_s
from specserve.policies import Policy
from specserve.request import FinishReason, Request
from specserve.stop_rules import StopRule
from specserve.waiting import WaitingQueue


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gave one request: new tokens, and whether it ended with them."""

    request: Request
    token_ids: list[int]
    log_probs: list[float]
    finish_reason: FinishReason | None


class Scheduler:
    """Continuous batching: every step closes a part of every request's gap.

    A request waits, runs and finishes; a running one may be preempted (all blocks given back, its
    tokens recomputed later) when memory runs out. There are no phases: a prompt, a chunk of it and
    a decoded token are all base tokens.

    Requests wait in order of their TTFT deadlines, and their classes by their shares. With a
    `Pacer`, prompt chunks are cut so that decoding rows stay on schedule, and requests that would
    be late can be refused early.

    Args:
        max_draft_tokens: hard cap of a row and step, whatever policy and request ask for.
        max_lookup_tokens: that of prompt lookup, where the policy takes as many.

    Attributes:
        speculates_sampled: False keeps sampled requests from drafting, see `EngineInfo`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        policy: Policy,
        slo: SLOConfig | None = None,
        max_draft_tokens: int = 8,
        max_lookup_tokens: int = 16,
    ) -> None:
        for name in ("max_num_seqs", "prefill_chunk_tokens"):
            if getattr(config, name) < 1:
                raise ValueError(f"scheduler.{name} is {getattr(config, name)}: must be at least 1")
        caps = {"max_draft_tokens": max_draft_tokens, "max_lookup_tokens": max_lookup_tokens}
        for name, cap in caps.items():
            if cap < 0:
                raise ValueError(f"policy.{name} is {cap}: must be at least 0, which is no draft")
        if config.max_num_batched_tokens < config.max_num_seqs:
            raise ValueError(
                f"scheduler.max_num_batched_tokens is {config.max_num_batched_tokens}: must be at "
                f"least scheduler.max_num_seqs ({config.max_num_seqs}), one base token for each row"
            )
        self.config = config
        self.blocks = blocks
        self.policy = policy
        slo = slo or SLOConfig()
        self.admission = Admission(config, blocks, slo)
        self.max_draft_tokens = max_draft_tokens
        self.max_lookup_tokens = max_lookup_tokens
        self.speculates_sampled = True
        self.lookup = PromptLookup()
        self.waiting = WaitingQueue(self.admission.deadline_s, slo.shares)
        self.running: list[Request] = []
        self._requests: dict[int, Request] = {}
        self._released: list[int] = []
        self._next_expiry_s = float("inf")
        self._room_to_join = 0
        self.num_preemptions = 0

    @property
    def pacer(self) -> Pacer | None:
        """What paces prompts and predicts waits; None before there is a predictor."""
        return self.admission.pacer

    @pacer.setter
    def pacer(self, pacer: Pacer | None) -> None:
        self.admission.pacer = pacer

    # -- requests in and out -------------------------------------------------------------------

    def submit(self, request: Request, now: float = 0.0) -> None:
        """Queue a request.

        Raises:
            ValueError: if it could never run, naming the value, the limit and the fix.
            Rejected: if the queue is full, or it would be late and its class is told early.
        """
        self.check(request)
        self.admission.reject(request, self.waiting, self.running, now)
        self._requests[request.key] = request
        self._next_expiry_s = min(self._next_expiry_s, request.expires_s)
        self.waiting.put(request)

    def check(self, request: Request) -> None:
        """Refuse a request that could never run, as `submit` does; from any thread."""
        self.admission.check(request)

    def abort(self, key: int, reason: FinishReason = FinishReason.CANCELLED) -> Request | None:
        """End a request from outside and free its memory; None if it is not here any more."""
        request = self._requests.get(key)
        if request is None:
            return None
        if request in self.waiting:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
        self._finish(request, reason)
        return request

    def expired(self, now: float) -> list[Request]:
        """Return the requests whose time is over, for the caller to abort."""
        if now < self._next_expiry_s:
            return []
        later = [r.expires_s for r in self._requests.values() if r.expires_s > now]
        self._next_expiry_s = min(later, default=float("inf"))
        return [r for r in self._requests.values() if r.expires_s <= now]

    def take_released(self) -> list[int]:
        """Return, once, the keys whose state engines may drop."""
        released, self._released = self._released, []
        self.lookup.release(released)
        return released

    @property
    def has_work(self) -> bool:
        """Whether a step would have rows."""
        return bool(self.running or self.waiting)

    @property
    def requests(self) -> list[Request]:
        """Every request that has not finished."""
        return list(self._requests.values())

    # -- the step ------------------------------------------------------------------------------

    def schedule(self, now: float) -> Batch:
        """Choose the rows of a step: base tokens first, for every row, then a plan for drafts."""
        requests, sizes = self._schedule_base_tokens(now)
        self._room_to_join = self._left_for_prompts(sizes)
        rows = [self._row(request, n, now) for request, n in zip(requests, sizes, strict=True)]
        batch = Batch(rows)
        if any(row.max_draft_tokens for row in rows):
            batch.stop_rule = self._plan_drafts(rows, requests)
        return batch

    def _left_for_prompts(self, sizes: list[int]) -> int:
        """Return the prompt tokens a step has room for; none if a request had to wait for it."""
        taken = sum(size for size in sizes if size > 1)
        return 0 if self.waiting else max(0, self.config.prefill_chunk_tokens - taken)

    def join(self, num_tokens: int, now: float) -> list[Row]:
        """Take requests that have come since `schedule` into its step, with what fits of a prompt.

        Args:
            num_tokens: that the target is to compute in this step so far.

        Returns:
            Rows that draft nothing, to go behind the step's others.
        """
        if not (self.waiting and self._room_to_join):
            return []
        room = self.config.max_num_batched_tokens - num_tokens
        budget = min(self._room_to_join, room, self.waiting.num_tokens)
        if self.pacer is not None:
            decoding = [r for r in self.running if r.num_uncomputed_tokens == 1]
            budget = self.pacer.joining_tokens(decoding, num_tokens, budget, now)
        chosen: dict[int, int] = {}
        self._admit(budget, chosen, now)
        rows = [self._row(r, chosen[r.key], now) for r in self.running if r.key in chosen]
        for row in rows:
            row.max_draft_tokens, row.lookup = 0, None
        return rows

    def commit(
        self,
        batch: Batch,
        drafts: list[Draft],
        chosen: list[list[int]],
        outputs: list[Verified],
        now: float,
    ) -> list[StepOutput]:
        """Append what was verified, move the counters, give back memory, finish what is done."""
        results = []
        for row, draft, choice, verified in zip(batch.rows, drafts, chosen, outputs, strict=True):
            request = self._requests[row.key]
            if verified.failed:
                self.abort(row.key, FinishReason.ERROR)
                results.append(StepOutput(request, [], [], FinishReason.ERROR))
                continue
            self._advance(request, row, draft, verified)
            if row.samples:
                results.append(self._append(request, draft, choice, verified, now))
            if not request.is_finished:
                self.blocks.truncate(request.block_table, request.num_tokens)
        return results

    def forget_draft_kv(self) -> None:
        """Take what the draft engine has computed for gone; it catches up when it drafts again."""
        for request in self.running:
            request.num_draft_computed_tokens = 0

    def check_integrity(self) -> None:
        """Assert that queues, counters and block tables agree."""
        self.blocks.check_integrity(request.block_table for request in self.requests)
        assert sorted(self._requests) == sorted(
            request.key for request in [*self.waiting, *self.running]
        ), "a request is in no queue or in two"
        for request in self.waiting:
            assert not request.block_table, f"waiting request {request.key} holds blocks"
            assert request.num_computed_tokens == 0, f"waiting request {request.key} has KV"
        for request in self.running:
            held = len(request.block_table) * self.blocks.block_size
            assert request.num_computed_tokens <= held, (
                f"request {request.key}: {request.num_computed_tokens} tokens in {held} slots"
            )
            assert request.num_draft_computed_tokens <= request.num_tokens
            assert request.num_computed_tokens < request.num_tokens, (
                f"request {request.key} has no gap: all {request.num_tokens} tokens are computed"
            )

    # -- base tokens ---------------------------------------------------------------------------

    def _schedule_base_tokens(self, now: float) -> tuple[list[Request], list[int]]:
        """Give decoding rows their token, then prompts their chunks, then admit who waits."""
        chosen: dict[int, int] = {}
        preemptions = self.num_preemptions
        decoding = [r for r in self.running if r.num_uncomputed_tokens == 1]
        prompts = [r for r in self.running if r.num_uncomputed_tokens > 1]
        for request in decoding:
            if self._is_running(request) and self._make_room(request, 1, chosen, now):
                chosen[request.key] = 1
        room = self.config.max_num_batched_tokens - len(chosen)
        budget = min(self.config.prefill_chunk_tokens, room)
        if self.pacer is not None and (prompts or self.waiting):
            wanted = sum(r.num_uncomputed_tokens for r in prompts) + self.waiting.num_tokens
            budget = self.pacer.prefill_tokens(decoding, min(budget, wanted), now)
        for request in prompts:
            size = min(request.num_uncomputed_tokens, budget)
            if size and self._is_running(request) and self._make_room(request, size, chosen, now):
                chosen[request.key] = size
                budget -= size
        if (
            self.num_preemptions == preemptions
        ):  # whoever was just preempted would come straight back
            self._admit(budget, chosen, now)
        requests = [request for request in self.running if request.key in chosen]
        return requests, [chosen[request.key] for request in requests]

    def _admit(self, budget: int, chosen: dict[int, int], now: float) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            request = self.waiting.next()
            size = min(request.num_uncomputed_tokens, budget)
            spare = self.admission.num_spare_blocks(len(self.running))
            if self.running and self.blocks.blocks_for(size) > spare:
                return
            if not self.blocks.extend(request.block_table, size):
                return
            self.waiting.take(request)
            self.running.append(request)
            if request.first_scheduled_s is None:
                request.first_scheduled_s = now
            chosen[request.key] = size
            budget -= size

    def _make_room(self, request: Request, size: int, chosen: dict[int, int], now: float) -> bool:
        """Extend a table for `size` base tokens, preempting other requests if need be.

        The one with the most slack goes first, so best effort before promises; the youngest of
        equals.

        Returns:
            False if the request itself was preempted.
        """
        while not self.blocks.extend(request.block_table, request.num_computed_tokens + size):
            victim = max(reversed(self.running), key=lambda r: slack_s(r, now))
            self._preempt(victim)
            chosen.pop(victim.key, None)
            if victim is request:
                return False
        return True

    def _is_running(self, request: Request) -> bool:
        """Whether an earlier row of this step has not preempted the request."""
        return bool(request.block_table)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.blocks.release(request.block_table)
        request.num_computed_tokens = 0
        request.num_draft_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._released.append(request.key)
        self.waiting.put_first(request)

    # -- drafts --------------------------------------------------------------------------------

    def _row(self, request: Request, size: int, now: float) -> Row:
        start = request.num_computed_tokens
        row = Row(
            key=request.key,
            num_computed_tokens=start,
            token_ids=request.token_ids[start : start + size],
            samples=start + size == request.num_tokens,
            block_table=request.block_table,
            num_prompt_tokens=request.num_prompt_tokens,
            sampling=request.sampling,
            draft_source=request.draft_source,
            owed_tokens=owed_tokens(request, now, AIM),
            tpot_s=request.slo.tpot_s and AIM * request.slo.tpot_s,
        )
        # A prompt's first token does not wait for a draft.
        if request.num_uncomputed_tokens == 1 and self._may_speculate(request):
            self._allow_draft(row, request)
        return row

    def _may_speculate(self, request: Request) -> bool:
        is_exact = self.speculates_sampled or request.sampling.is_greedy
        return is_exact and request.draft_source != "none"

    def _allow_draft(self, row: Row, request: Request) -> None:
        wishes = (request.max_draft_tokens, request.num_draft_tokens)
        limit = min([request.num_draftable_tokens, *(n for n in wishes if n is not None)])
        row.has_fixed_draft = request.num_draft_tokens is not None
        row.max_draft_tokens = min(limit, self.max_draft_tokens)
        if request.draft_source != "model":
            longest = self.max_draft_tokens if row.has_fixed_draft else self.max_lookup_tokens
            row.lookup = self.lookup.propose(
                request.key, request.token_ids, min(limit, longest), request.num_prompt_tokens
            )
        if request.draft_source == "ngram":
            row.max_draft_tokens = len(row.lookup.token_ids) if row.lookup else 0

    def _plan_drafts(self, rows: list[Row], requests: list[Request]) -> StopRule | None:
        """Ask the policy, then cut its plan to the step's token budget and the free memory."""
        plan = self.policy.plan(rows)
        budget = self.config.max_num_batched_tokens - sum(len(row.token_ids) for row in rows)
        for i, (row, request) in enumerate(zip(rows, requests, strict=True)):
            _choose_source(row, plan, i)
            wanted = len(row.lookup.token_ids) if row.lookup else row.max_draft_tokens
            if not row.has_fixed_draft:
                wanted = min(wanted, plan.max_draft_tokens[i])
            row.is_draft_sampled = plan.is_sampled and not row.sampling.is_greedy
            num_tokens = self._reserve_draft(request, min(wanted, budget))
            budget -= num_tokens
            row.max_draft_tokens = 0 if row.lookup else num_tokens
            if row.lookup:
                row.lookup = row.lookup.first(num_tokens)
            elif num_tokens:
                start = row.num_draft_computed_tokens = request.num_draft_computed_tokens
                row.catch_up_token_ids = request.token_ids[start:]
        return plan.stop_rule

    def _reserve_draft(self, request: Request, wanted: int) -> int:
        """Extend the table for as much of a draft as free memory allows; drafts never preempt."""
        if wanted <= 0:
            return 0
        slots = len(request.block_table) + self.blocks.num_free_blocks
        wanted = max(0, min(wanted, slots * self.blocks.block_size - request.num_tokens))
        self.blocks.extend(request.block_table, request.num_tokens + wanted)
        return wanted

    # -- commit --------------------------------------------------------------------------------

    def _advance(self, request: Request, row: Row, draft: Draft, verified: Verified) -> None:
        """Move both counters over what is now valid, before the outputs are appended."""
        accepted = verified.num_accepted_tokens
        request.num_computed_tokens += len(row.token_ids) + accepted
        if draft.token_ids and not row.lookup:
            # The draft engine saw all known tokens and its own proposals but the last.
            seen = min(accepted, len(draft.token_ids) - 1)
            request.num_draft_computed_tokens = request.num_tokens + seen

    def _append(
        self, request: Request, draft: Draft, choice: list[int], verified: Verified, now: float
    ) -> StepOutput:
        request.num_drafted_tokens += len(draft.token_ids)
        request.num_verified_tokens += len(choice)
        request.num_accepted_tokens += verified.num_accepted_tokens
        token_ids = verified.output_token_ids[: request.max_tokens - request.num_output_tokens]
        reason = None
        if request.sampling.end_id in token_ids:
            token_ids = token_ids[: token_ids.index(request.sampling.end_id) + 1]
            reason = FinishReason.END_ID
        request.token_ids.extend(token_ids)
        if reason is None and request.num_output_tokens == request.max_tokens:
            reason = FinishReason.LENGTH
        if request.first_token_s is None:
            request.first_token_s = now
            self.admission.learn(request)
        else:
            request.num_decode_steps += 1
        request.last_token_s = now
        if reason is not None:
            self.running.remove(request)
            self._finish(request, reason)
        return StepOutput(request, token_ids, verified.log_probs[: len(token_ids)], reason)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self.blocks.release(request.block_table)
        request.finish_reason = reason
        del self._requests[request.key]
        self._released.append(request.key)


def _choose_source(row: Row, plan: DraftPlan, index: int) -> None:
    """Keep a row's lookup if that is what it proposes."""
    is_chosen = plan.uses_lookup is not None and plan.uses_lookup[index]
    if row.draft_source != "ngram" and not is_chosen:
        row.lookup = None
