"""Stop rules evaluated on the device, so that the draft loop does not come back to the host.

The rules of `specserve.stop_rules` in PyTorch, on tensors that never move and shapes that depend on
the number of rows only: a row that has stopped is masked, not dropped. What they decide is decided
there; `tests/test_torch_stoppers.py` holds the two against each other.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from specserve.engines.torch.baseline_stoppers import (
    BestLengthStopper,
    GoodputStopper,
    ThresholdStopper,
)
from specserve.engines.torch.transfer import send
from specserve.engines.torch.value_stopper import DeviceValueStopper, logit, sigmoid
from specserve.policies.baseline_rules import BestLengthRule, GoodputRule, ThresholdRule
from specserve.stop_rules import SurvivalRule, ValueRule


class Stopper(Protocol):
    """One kind of rule, on the device; made for so many rows and draft tokens of a row."""

    def load(self, rule: Any) -> None:
        """Begin a step with a rule for its rows."""

    def goes_on(self, active: Tensor, confidences: Tensor) -> Tensor:
        """Take the newest token's confidence of the active rows; say which draft another.

        Args:
            active: bool [n].
            confidences: float64 [n].

        Returns:
            bool [n], of no meaning where a row is not active.
        """


class CapStopper:
    """No rule: every row drafts up to its cap."""

    def __init__(self, max_rows: int, max_draft_tokens: int, device: torch.device) -> None:
        pass

    def load(self, rule: None) -> None:
        """Nothing to load. See `Stopper`."""

    def goes_on(self, active: Tensor, confidences: Tensor) -> Tensor:
        """Stop nobody. See `Stopper`."""
        return active


class SurvivalStopper:
    """`SurvivalRule`: stop below a calibrated survival."""

    def __init__(self, max_rows: int, max_draft_tokens: int, device: torch.device) -> None:
        self._rows = torch.zeros((2, max_rows), dtype=torch.float64, device=device)
        self._min_survival, self._survival = self._rows
        self._weights = torch.zeros(2, dtype=torch.float64, device=device)

    def load(self, rule: SurvivalRule) -> None:
        """Begin a step. See `Stopper`."""
        num_rows = len(rule.min_survival)
        rows = np.stack([rule.min_survival, np.ones(num_rows)])
        self._rows[:, :num_rows].copy_(send(rows, self._rows.device), non_blocking=True)
        self._weights.copy_(send(rule.bias_slope, self._rows.device), non_blocking=True)

    def goes_on(self, active: Tensor, confidences: Tensor) -> Tensor:
        """Multiply survivals. See `Stopper`."""
        survival = self._survival[: len(active)]
        bias, slope = self._weights
        accepted = sigmoid(bias + slope * logit(confidences))
        survival *= torch.where(active, accepted, 1.0)
        on: Tensor = survival >= self._min_survival[: len(active)]
        return on


def _value_stopper(max_rows: int, max_draft_tokens: int, device: torch.device) -> Stopper:
    if device.type != "cuda":
        return DeviceValueStopper(max_rows, max_draft_tokens, device)
    from specserve.engines.torch.value_kernel import FusedValueStopper

    return FusedValueStopper(max_rows, max_draft_tokens, device)


STOPPERS: dict[type, Callable[[int, int, torch.device], Stopper]] = {
    type(None): CapStopper,
    SurvivalRule: SurvivalStopper,
    ValueRule: _value_stopper,
    ThresholdRule: ThresholdStopper,
    GoodputRule: GoodputStopper,
    BestLengthRule: BestLengthStopper,
}
