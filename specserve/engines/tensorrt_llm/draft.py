"""The draft on an executor: greedy continuations, stopped row by row."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Batch, Draft
from specserve.config import Config
from specserve.engines.tensorrt_llm import binding, limits
from specserve.engines.tensorrt_llm.executor import Answer, Executor
from specserve.engines.tensorrt_llm.executor_config import make_executor_config
from specserve.engines.tensorrt_llm.planned_stop import PlannedStop
from specserve.engines.tensorrt_llm.requests import Requests
from specserve.engines.tensorrt_llm.sequences import Sequences
from specserve.engines.tensorrt_llm.step_stop import StepStop, Watched
from specserve.stop_rules import Stopper

logger = logging.getLogger(__name__)

# The bindings make a list of all tokens of a call for every pass. Beyond this many, at some 30 ns
# each, that takes about a millisecond, which is what a pass of a small model takes: an estimate.
MAX_WATCHED_TOKENS = 32768


def load(config: Config) -> "TensorRTLLMDraftEngine":
    """Load the draft engine that the configuration names.

    Raises:
        ValueError: with the fix.
    """
    api = binding.load()
    folder, manifest, compiled = limits.load_role(config, "draft")
    step_stop = None
    stop_id = _stop_id(manifest.vocab_size, compiled.vocab_rows)
    if limits.stops_by_step(config, compiled):
        step_stop = StepStop(manifest.vocab_size, stop_id)
    executor = Executor(
        api,
        folder,
        make_executor_config(api, config, "draft", compiled, step_stop),
        role="draft",
        timeout_s=config.server.draft_timeout_s,
    )
    requests = Requests(api, compiled.vocab_rows)
    return TensorRTLLMDraftEngine(executor, requests, manifest.vocab_size, step_stop)


def _stop_id(vocab_size: int, num_rows: int) -> int:
    """Return the token that ends a watched draft: one without text, or else the last one.

    A draft in which the last one comes by itself ends there, that token included.
    """
    return min(vocab_size, num_rows - 1)


class TensorRTLLMDraftEngine:
    """A draft model behind the `DraftEngine` protocol.

    Args:
        vocab_size: ids from there on are padding, and end a draft.
        step_stop: the executor's post-processor, if it has one; without it lengths are planned.
    """

    def __init__(
        self,
        executor: Executor,
        requests: Requests,
        vocab_size: int,
        step_stop: StepStop | None = None,
    ) -> None:
        self._executor = executor
        self._requests = requests
        self._vocab_size = vocab_size
        self._step_stop = step_stop
        self._planned_stop = PlannedStop()
        self._sequences = Sequences()
        self._next_client_id = 1

    def draft(self, batch: Batch) -> list[Draft]:
        """Propose a continuation of each row. See `DraftEngine`."""
        drafts = [Draft() for _ in batch.rows]
        stopper = batch.stop_rule.start() if batch.stop_rule else None
        known = self._take_in(batch)
        active = np.array(sorted(known), dtype=np.int64)
        if stopper is not None and len(active):
            active = active[stopper.begins()[active]]
        if not len(active):
            return drafts
        caps = np.array([row.max_draft_tokens for row in batch.rows])
        wave = {i: known[i] for i in active.tolist()}
        if self._step_stop is not None and sum(map(len, wave.values())) <= MAX_WATCHED_TOKENS:
            made = self._watch(self._step_stop, wave, caps, stopper)
        else:
            made = self._plan(wave, self._planned_stop.lengths(stopper, active, caps))
        for i, draft in made.items():
            drafts[i] = draft
            self._planned_stop.learn(draft.confidences)
            self._sequences.append(batch.rows[i].key, draft.token_ids)
        return drafts

    def release(self, keys: Sequence[int]) -> None:
        """Forget sequences; the executor evicts their blocks in time."""
        self._sequences.release(keys)

    def close(self) -> None:
        """End the executor."""
        self._executor.close()

    def _take_in(self, batch: Batch) -> dict[int, list[int]]:
        """Return the sequences of the rows that may draft, by index.

        A row whose beginning is not here sits the step out: this process is new, and the next step
        sends everything again.
        """
        known: dict[int, list[int]] = {}
        for i, row in enumerate(batch.rows):
            if not row.max_draft_tokens:
                continue
            start, new = row.num_draft_computed_tokens, row.catch_up_token_ids
            sequence = self._sequences.put(row.key, start, new)
            if sequence is None:
                logger.warning("request %d: its first %d tokens are not here", row.key, start)
            else:
                known[i] = sequence
        return known

    def _watch(
        self,
        step_stop: StepStop,
        wave: dict[int, list[int]],
        caps: NDArray[np.int64],
        stopper: Stopper | None,
    ) -> dict[int, Draft]:
        """Draft until the rule says so, token by token."""
        first_id = self._next_client_id
        self._next_client_id += len(wave)
        rows = {first_id + n: Watched(i, len(wave[i])) for n, i in enumerate(wave)}
        requests = [
            self._requests.watched_draft(
                wave[row.index], int(caps[row.index]), client_id, step_stop.stop_id
            )
            for client_id, row in rows.items()
        ]
        step_stop.begin(rows, stopper)
        try:
            answers = self._executor.run(requests)
        finally:
            step_stop.end()
        _check(answers)
        return {
            row.index: _agreed(row.draft, answer, step_stop.stop_id)
            for row, answer in zip(rows.values(), answers, strict=True)
            if not answer.error
        }

    def _plan(self, wave: dict[int, list[int]], lengths: NDArray[np.int64]) -> dict[int, Draft]:
        """Draft as many tokens as planned."""
        requests: list[Any] = [
            self._requests.draft(sequence, int(lengths[i])) for i, sequence in wave.items()
        ]
        answers = self._executor.run(requests)
        _check(answers)
        return {
            i: self._without_padding(answer)
            for i, answer in zip(wave, answers, strict=True)
            if not answer.error
        }

    def _without_padding(self, answer: Answer) -> Draft:
        confidences = [math.exp(value) for value in answer.log_probs]
        draft = Draft(answer.token_ids, confidences)
        ends = (n for n, token_id in enumerate(draft.token_ids) if token_id >= self._vocab_size)
        return draft.first(next(ends, len(draft.token_ids)))


def _check(answers: Sequence[Answer]) -> None:
    """Let rows whose draft failed do without; nothing else is lost.

    Raises:
        RuntimeError: if all failed.
    """
    errors = [answer.error for answer in answers if answer.error]
    if len(errors) == len(answers):
        raise RuntimeError(f"the draft executor refuses everything: {errors[0]}")
    for error in errors:
        logger.warning("a row was not drafted: %s", error)


def _agreed(seen: Draft, answer: Answer, stop_id: int) -> Draft:
    """Return what was read off, as far as the executor went on with the same tokens.

    The last token was never drawn where the end took its place. Where two are equally likely, the
    executor may have drawn the other one: then what was read off after it follows another text.
    """
    drawn = answer.token_ids
    if answer.has_ended and drawn[-1:] == [stop_id]:
        drawn = drawn[:-1]
    for n, (ours, theirs) in enumerate(zip(seen.token_ids, drawn, strict=False)):
        if ours != theirs:
            return seen.first(n)
    return seen.first(len(drawn) + answer.has_ended)
