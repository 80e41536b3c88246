"""Verification on the device: draws, compares, and brings what stands in the step's one copy."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specserve.batch import Verified
from specserve.engines.paged_model import FlatBatch
from specserve.engines.sampler import Segment, check_finite, params_of, rows_of
from specserve.engines.torch import sampling
from specserve.engines.torch.model import TorchModel
from specserve.engines.torch.transfer import send

NO_TOKEN = -1  # where a draft ends: nothing agrees with it


class DeviceSampler:
    """The `Sampler` of a `TorchModel`."""

    def __init__(self, model: TorchModel) -> None:
        self.model = model

    def sample(
        self, flat: FlatBatch, logit_rows: NDArray[np.int64], segments: Sequence[Segment]
    ) -> list[Verified]:
        """Run one pass. See `Sampler`."""
        hidden = self.model.hidden_of(flat, logit_rows)
        if not segments:
            self.model.wait()
            return []
        logits = self.model.logits(hidden)
        token_ids = self._target_tokens(logits, segments)
        stands = self._stands(token_ids, segments)
        log_probs = self._log_probs(logits, token_ids, segments)
        rows = (token_ids, stands, log_probs, logits.amax(dim=1))
        on_host = (
            torch.stack([row.double() for row in rows]).cpu().numpy()
        )  # the one wait of the step
        check_finite(on_host[3])
        return [_verified(segment, *on_host[:3]) for segment in segments]

    def _target_tokens(self, logits: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Return the target's own token at every logits row."""
        adjusted = [s for s in segments if s.row.sampling.changes_logits]
        drawn = [s for s in segments if not s.row.sampling.is_greedy]
        if adjusted:
            logits = sampling.adjust_logits(logits, adjusted)
        token_ids = logits.argmax(dim=1)
        if drawn:
            rows = send(rows_of(drawn), self.model.device)
            positions = np.concatenate([s.first_position + np.arange(s.length) for s in drawn])
            draw = sampling.Draw(
                params_of(drawn), positions, self.model.vocab_size, self.model.device
            )
            token_ids[rows] = sampling.winner(draw.race(logits[rows]))
        return token_ids

    def _stands(self, token_ids: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Say which tokens [r] follow nothing but accepted ones. See `specserve.sampling.agree`."""
        drafted = np.concatenate([[*s.draft, NO_TOKEN] for s in segments])
        begins = np.repeat([s.begin for s in segments], [s.length for s in segments])
        drafted_ids, first = send(np.stack([drafted, begins]).astype(np.int64), token_ids.device)
        is_rejected = token_ids != drafted_ids
        rejected_before = is_rejected.cumsum(0) - is_rejected.long()
        stands: Tensor = rejected_before == rejected_before[first]
        return stands

    def _log_probs(self, logits: Tensor, token_ids: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Return them [r] where they are wanted, else 0."""
        log_probs = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        wanted = [s for s in segments if s.row.sampling.return_log_probs]
        if wanted:
            rows = send(rows_of(wanted), self.model.device)
            log_probs[rows] = sampling.log_probs(logits[rows], token_ids[rows])
        return log_probs


def _verified(segment: Segment, *said: NDArray[np.float64]) -> Verified:
    token_ids, stands, log_probs = (rows[segment.begin : segment.end] for rows in said)
    num_tokens = int(stands.sum())
    output = token_ids[:num_tokens].astype(int).tolist()
    if not segment.row.sampling.return_log_probs:
        return Verified(output)
    return Verified(output, log_probs[:num_tokens].tolist())
