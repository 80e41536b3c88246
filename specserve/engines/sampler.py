"""From logits to the tokens a step emits: the seam, and the way in numpy.

The seam lies here because logits should stay where they are computed: an engine on a device brings
its own `Sampler` and hands over tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from specserve import sampling
from specserve.batch import Row, Verified
from specserve.engines.paged_model import FlatBatch, PagedModel
from specserve.sampling import Noise
from specserve.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Segment:
    """The logits rows [begin, end) of one sampling row, and what its tokens depend on.

    Attributes:
        draft: the chosen tokens, end - begin - 1 of them.
        history: prompt and output before the draft, where the parameters look back at it.
    """

    row: Row
    draft: Sequence[int]
    begin: int
    end: int
    history: Sequence[int]

    @property
    def length(self) -> int:
        """Return the number of logits rows."""
        return self.end - self.begin

    @property
    def first_position(self) -> int:
        """Return the output position of the first logits row's token."""
        row = self.row
        return row.num_computed_tokens + len(row.token_ids) - row.num_prompt_tokens


class Sampler(Protocol):
    """Runs a model and says which tokens follow."""

    def sample(
        self, flat: FlatBatch, logit_rows: NDArray[np.int64], segments: Sequence[Segment]
    ) -> list[Verified]:
        """Run one pass, draw the target's own token at every position, keep those that stand.

        Args:
            logit_rows: [r], rising, the tokens of the batch that are asked what follows them.
            segments: cover [0, r) in order.

        Returns:
            for each segment, what `specserve.sampling.agree` keeps of the target's own tokens, and
            their log probabilities where they are wanted.
        """


class HostSampler:
    """Takes a model's logits and samples in numpy."""

    def __init__(self, model: PagedModel) -> None:
        self.model = model
        self._noise = Noise(model.vocab_size)

    def sample(
        self, flat: FlatBatch, logit_rows: NDArray[np.int64], segments: Sequence[Segment]
    ) -> list[Verified]:
        """Run one pass. See `Sampler`."""
        logits = self.model.forward(flat, logit_rows)
        token_ids: list[int] = self._target_tokens(logits, segments).tolist()
        return [_verified(segment, token_ids, logits) for segment in segments]

    def _target_tokens(
        self, logits: sampling.Floats, segments: Sequence[Segment]
    ) -> NDArray[np.int64]:
        """Return the target's own token at every logits row."""
        token_ids: NDArray[np.int64] = logits.argmax(axis=1)  # the first NaN, if there is one
        check_finite(logits[np.arange(len(logits)), token_ids])
        drawn: list[Segment] = []
        adjusted: list[sampling.Floats] = []
        for segment in segments:
            params = segment.row.sampling
            rows = logits[segment.begin : segment.end]
            if params.changes_logits:
                rows = sampling.adjust_logits(
                    rows, params, segment.history, segment.row.num_prompt_tokens, segment.draft
                )
                token_ids[segment.begin : segment.end] = rows.argmax(axis=1)
            if not params.is_greedy:
                drawn.append(segment)
                adjusted.append(rows)
        if drawn:
            token_ids[rows_of(drawn)] = self._draw(np.concatenate(adjusted), drawn)
        return token_ids

    def _draw(self, logits: sampling.Floats, segments: Sequence[Segment]) -> NDArray[np.int64]:
        """Draw one token for each position of the segments, each with its own noise."""
        probs = sampling.target_probs(logits, params_of(segments))
        noise = [
            self._noise.rows(s.row.sampling.seed, s.first_position, s.first_position + s.length)
            for s in segments
        ]
        return sampling.sample(probs, np.concatenate(noise))


def _verified(segment: Segment, token_ids: list[int], logits: sampling.Floats) -> Verified:
    output = sampling.agree(token_ids[segment.begin : segment.end], segment.draft)
    if not segment.row.sampling.return_log_probs:
        return Verified(output)
    rows = logits[segment.begin : segment.begin + len(output)]
    return Verified(output, sampling.log_probs(rows, output))


def check_finite(best: NDArray[Any]) -> None:
    """Refuse logits of which the largest [r] are not numbers.

    Raises:
        ValueError: the model is broken.
    """
    if not np.isfinite(best).all():
        raise ValueError("the target's logits are not finite")


def rows_of(segments: Sequence[Segment]) -> NDArray[np.int64]:
    """Return the logits rows of some segments."""
    return np.concatenate([np.arange(s.begin, s.end) for s in segments])


def params_of(segments: Sequence[Segment]) -> list[SamplingParams]:
    """Return the parameters of each of these rows."""
    return [s.row.sampling for s in segments for _ in range(s.length)]
