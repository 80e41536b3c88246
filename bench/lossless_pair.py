"""The demo pair serving for `bench.lossless`: real texts, and step times of a larger target."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.arms import arm_overrides
from specserve import engines
from specserve.assemble import assemble
from specserve.batch import Batch, Draft, Verified
from specserve.config import load_config
from specserve.core import SpecServe
from specserve.engines import DraftEngine, TargetEngine
from specserve.engines.model_draft import ModelDraftEngine
from specserve.engines.model_target import ModelTargetEngine
from specserve.engines.paged_model import FlatBatch, Span
from specserve.engines.simulated import VirtualClock
from specserve.pacing import Pacer
from specserve.policies import Policy, make_policy, needs_profile
from specserve.predictor.profile import Profile
from specserve.predictor.step_time import StepTimeModel
from specserve.request import FinishReason, Request
from specserve.text import load_tokenizer

NUM_ROWS = 8


class Served(NamedTuple):
    """Requests with their outputs, and what it took.

    Attributes:
        draft_tokens: drafted, verified, accepted.
    """

    requests: list[Request]
    draft_tokens: tuple[int, int, int]

    @property
    def output_token_ids(self) -> list[list[int]]:
        """Return the output of each request."""
        return [request.token_ids[request.num_prompt_tokens :] for request in self.requests]


@dataclass(frozen=True, slots=True)
class Priced:
    """Both engines, which take on a virtual clock what a profile says.

    Args:
        truth: give the policy a model of its own.
    """

    draft_engine: DraftEngine
    target_engine: TargetEngine
    truth: StepTimeModel
    clock: VirtualClock

    def draft(self, batch: Batch) -> list[Draft]:
        """See `DraftEngine`."""
        drafts = self.draft_engine.draft(batch)
        lengths = [len(draft.token_ids) for draft in drafts]
        forwards = [sum(n > j for n in lengths) for j in range(max(lengths))]
        catch_up = sum(len(row.catch_up_token_ids) for row in batch.rows)
        self.clock.advance(self.truth.draft_s(forwards, catch_up))
        return drafts

    def verify(self, batch: Batch, chosen: Sequence[Sequence[int]]) -> list[Verified]:
        """See `TargetEngine`."""
        num_tokens = batch.num_base_tokens + sum(map(len, chosen))
        context = sum(row.num_computed_tokens for row in batch.rows)
        self.clock.advance(self.truth.verify_s(num_tokens, context))
        return self.target_engine.verify(batch, chosen)

    def release(self, keys: Sequence[int]) -> None:
        """See `TargetEngine`."""
        self.draft_engine.release(keys)
        self.target_engine.release(keys)


class Pair:
    """The demo pair in f32, loaded once.

    Args:
        profile: of the target whose step times policies see.
        num_threads: of each engine, 0 takes all cores.
    """

    def __init__(self, profile: Path, num_threads: int = 0) -> None:
        overrides = ["engine.precision=f32", f"engine.num_threads={num_threads}"]
        self._config = load_config(None, overrides)
        self._info = engines.describe(self._config)
        self._profile = Profile.load(profile)
        self.draft = engines.make_draft_engine(self._config)
        self.target = engines.make_target_engine(self._config)
        assert isinstance(self.draft, ModelDraftEngine)
        assert isinstance(self.target, ModelTargetEngine)
        self.draft_model, self.target_model = self.draft.model, self.target.model
        self.tokenizer = load_tokenizer(Path(self._config.engine.dir) / "target")

    def serve(self, requests: list[Request], arm: str, num_rows: int = NUM_ROWS) -> Served:
        """Serve under one of `bench.arms`, with the engines that serve."""
        config = load_config(None, arm_overrides(arm)).policy
        step_time = StepTimeModel(self._profile)
        policy = make_policy(config, step_time)
        pacer = Pacer(step_time) if needs_profile(config.name) else None
        return self.serve_with(requests, policy, self.draft, self.target, pacer, num_rows)

    def serve_with(
        self,
        requests: list[Request],
        policy: Policy,
        draft: DraftEngine,
        target: TargetEngine,
        pacer: Pacer | None = None,
        num_rows: int = NUM_ROWS,
    ) -> Served:
        """Serve with these parts."""
        clock = VirtualClock()
        both = Priced(draft, target, StepTimeModel(self._profile), clock)
        limits = [f"scheduler.max_num_seqs={num_rows}", "telemetry.source=none"]
        core = assemble(
            load_config(None, limits), info=self._info, draft_engine=both, target_engine=both,
            policy=policy, clock=clock,
        )  # fmt: skip
        core.use(policy, pacer)
        _run(core, requests)
        stats = core.stats
        return Served(
            requests,
            (stats.num_drafted_tokens, stats.num_verified_tokens, stats.num_accepted_tokens),
        )

    def logits_of(self, request: Request) -> NDArray[np.float32]:
        """Return the logits [output tokens, vocab_size] that each output token was drawn from.

        The text is read again in one pass, alone and into an empty cache.
        """
        text = request.token_ids[:-1]
        blocks = list(range(-(-len(text) // self._info.block_size)))
        rows = np.arange(request.num_prompt_tokens - 1, len(text))
        return self.target_model.forward(FlatBatch.pack([Span(text, 0, blocks)]), rows)


def _run(core: SpecServe, requests: Sequence[Request]) -> None:
    """Step until all requests have ended.

    Raises:
        RuntimeError: an engine failed, so that less was tried than it seems.
    """
    for request in requests:
        core.scheduler.submit(request)
    while core.scheduler.has_work:
        core.step()
    num_short = sum(request.finish_reason is not FinishReason.LENGTH for request in requests)
    if core.draft_engine.num_failures or num_short:
        raise RuntimeError(
            f"the draft engine failed {core.draft_engine.num_failures} times, and {num_short} "
            "requests did not come to their end"
        )
