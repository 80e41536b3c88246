"""The target's own tokens, drawn on the device: logits stay there, one copy brings the tokens."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specserve.engines.paged_model import FlatBatch
from specserve.engines.sampler import Said, Segment, check_finite, params_of, rows_of
from specserve.engines.torch import sampling
from specserve.engines.torch.model import TorchModel
from specserve.engines.torch.transfer import send


class DeviceSampler:
    """The `Sampler` of a `TorchModel`."""

    def __init__(self, model: TorchModel) -> None:
        self.model = model

    def sample(
        self, flat: FlatBatch, logit_rows: NDArray[np.int64], segments: Sequence[Segment]
    ) -> Said:
        """Run one pass. See `Sampler`."""
        hidden = self.model.hidden_of(flat, logit_rows)
        if not segments:
            return Said([], [])
        logits = self.model.logits(hidden)
        token_ids = self._target_tokens(logits, segments)
        log_probs = self._log_probs(logits, token_ids, segments)
        said = torch.stack([token_ids.double(), log_probs, logits.amax(dim=1).double()])
        on_host = said.cpu().numpy()  # the one wait of the step
        check_finite(on_host[2])
        return Said(on_host[0].astype(int).tolist(), on_host[1].tolist())

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

    def _log_probs(self, logits: Tensor, token_ids: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Return them [r] where they are wanted, else 0."""
        log_probs = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        wanted = [s for s in segments if s.row.sampling.return_log_probs]
        if wanted:
            rows = send(rows_of(wanted), self.model.device)
            log_probs[rows] = sampling.log_probs(logits[rows], token_ids[rows])
        return log_probs
