"""A pair that takes no time: durations from a profile, acceptance from a process, a virtual clock.

Serves capacity planning and policy tests. Scheduler, policies and step are the ones that serve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Batch, Draft, Row, Verified
from specserve.predictor.prompts import Prompts
from specserve.predictor.step_time import StepTimeModel


class VirtualClock:
    """Seconds that pass only when someone says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds


class AcceptanceProcess(Protocol):
    """What a draft would propose at some place of a request's output."""

    def at(self, key: int, position: int) -> tuple[Sequence[float], int]:
        """Return the confidences of the next draft tokens, and how many of them are accepted.

        Args:
            key: the request.
            position: output tokens before the draft.
        """


class RecordedAcceptance:
    """Replays a recording; requests walk along its texts, begun at a random place.

    Args:
        confidences: [num_texts, num_positions, k].
        num_accepted: [num_texts, num_positions], of the k tokens drafted there.
        seed: of which text a request follows, and from where.
    """

    def __init__(
        self, confidences: NDArray[np.float32], num_accepted: NDArray[np.int8], seed: int = 0
    ) -> None:
        self._confidences: list[list[list[float]]] = confidences.tolist()
        self._num_accepted: list[list[int]] = num_accepted.tolist()
        self._num_positions = confidences.shape[1]
        self._seed = seed
        self._places: dict[int, tuple[int, int]] = {}

    @classmethod
    def load(cls, path: Path, seed: int = 0) -> "RecordedAcceptance":
        """Read a recording made by `bench.record_acceptance`."""
        with np.load(path) as arrays:
            return cls(arrays["confidences"], arrays["num_accepted"], seed)

    def at(self, key: int, position: int) -> tuple[Sequence[float], int]:
        """Return what was recorded there. See `AcceptanceProcess`."""
        place = self._places.get(key)
        if place is None:
            rng = np.random.default_rng((self._seed, key))
            text = int(rng.integers(len(self._num_accepted)))
            place = self._places[key] = (text, int(rng.integers(self._num_positions // 2)))
        text, start = place
        at = (start + position) % self._num_positions
        return self._confidences[text][at], self._num_accepted[text][at]


@dataclass(frozen=True, slots=True)
class SimulatedPair:
    """Both engines of one simulated device.

    Args:
        truth: how long things really take; give the policy a model of its own.
        clock: advanced by every call.
        process: what is proposed and accepted.
    """

    truth: StepTimeModel
    clock: VirtualClock
    process: AcceptanceProcess

    def draft(self, batch: Batch) -> list[Draft]:
        """Propose what the process has, under the batch's stop rule. See `DraftEngine`."""
        drafts = [Draft() for _ in batch.rows]
        active = np.array([i for i, r in enumerate(batch.rows) if r.max_draft_tokens], dtype=int)
        stopper = batch.stop_rule.start() if batch.stop_rule else None
        if stopper and len(active):
            active = active[stopper.begins()[active]]
        if not len(active):
            return drafts
        caps = np.array([row.max_draft_tokens for row in batch.rows])
        lengths = np.zeros(len(batch.rows), dtype=int)
        proposed = np.zeros((len(batch.rows), int(caps.max())))
        for i in active.tolist():
            row = self.process.at(*_place(batch.rows[i]))[0]
            proposed[i] = row[: proposed.shape[1]]
        catch_up = sum(len(batch.rows[i].catch_up_token_ids) for i in active)
        rows_of_forwards: list[int] = []
        while len(active):
            position = len(rows_of_forwards)
            rows_of_forwards.append(len(active))
            lengths[active] = position + 1
            on = caps[active] > position + 1
            if stopper:
                on &= stopper.goes_on(active, proposed[active, position])
            active = active[on]
        for i in np.flatnonzero(lengths).tolist():
            count = int(lengths[i])
            drafts[i] = Draft([0] * count, proposed[i, :count].tolist())
        self.clock.advance(self.truth.draft_s(rows_of_forwards, catch_up))
        self.truth.has_drafted(rows_of_forwards[-1])
        return drafts

    def verify(self, batch: Batch, chosen: Sequence[Sequence[int]]) -> list[Verified]:
        """Accept what the process accepts. See `TargetEngine`.

        A draft token is 0 and so is what the process accepts; what it does not is 1.
        """
        outputs = []
        for row, draft in zip(batch.rows, chosen, strict=True):
            if not row.samples:
                outputs.append(Verified())
                continue
            would = self.process.at(*_place(row))[1]
            accepted = min(len(draft), would)
            outputs.append(Verified([0] * accepted + [int(would <= accepted)]))
        self.clock.advance(target_pass_s(self.truth, batch, chosen))
        return outputs

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept."""


def target_pass_s(truth: StepTimeModel, batch: Batch, chosen: Sequence[Sequence[int]]) -> float:
    """Return the seconds of a verification, after the one that was asked for last."""
    num_tokens = batch.num_base_tokens + sum(len(draft) for draft in chosen)
    context = sum(row.num_computed_tokens for row in batch.rows)
    prompts = Prompts.of(batch.rows)
    seconds = truth.verify_s(num_tokens, context, prompts)
    change_s = truth.change_curve(num_tokens, 0, prompts)[0]
    truth.has_verified(num_tokens)
    return seconds + float(change_s)


def _place(row: Row) -> tuple[int, int]:
    return row.key, row.num_computed_tokens + len(row.token_ids) - row.num_prompt_tokens
