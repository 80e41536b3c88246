"""How much to draft and what to verify: small objects that see rows, confidences and outcomes.

A policy never sees tensors or queues, and `select` sees no token ids: a rule that reads the token
it judges would change the output distribution as soon as drafts are sampled.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol

from specserve.batch import Batch, Decision, DraftPlan, Row, StepRecord
from specserve.config import PolicyConfig
from specserve.predictor.step_time import StepTimeModel


class Policy(Protocol):
    """Plans drafts, selects what the target verifies, and learns from the outcome."""

    def plan(self, rows: Sequence[Row]) -> DraftPlan:
        """Cap each row's draft and say when it stops; called before the draft engine.

        Args:
            rows: `max_draft_tokens` holds what the request and its end allow.
        """

    def select(self, batch: Batch, confidences: Sequence[Sequence[float]]) -> list[int]:
        """Return how many tokens of each row's draft the target verifies, a prefix of each.

        Args:
            confidences: of each row's draft tokens, in order.
        """

    def observe(self, record: StepRecord) -> None:
        """Learn from a finished step."""

    def release(self, keys: Sequence[int]) -> None:
        """Drop what is kept for these requests; unknown keys are ignored."""

    @property
    def decision(self) -> Decision:
        """Explain the last selection."""

    @property
    def calibration_error(self) -> float | None:
        """Return the expected calibration error of predicted acceptance, if it is predicted."""


class Unexplained:
    """What a policy that explains nothing says."""

    decision = Decision()
    calibration_error: float | None = None


# Name -> module with a function `make(config, step_time) -> Policy`; imported when chosen.
POLICIES = {
    "specserve": "specserve.policies.specserve",
    "none": "specserve.policies.fixed",
    "fixed": "specserve.policies.fixed",
    "adaptive": "specserve.policies.adaptive",
    "threshold": "specserve.policies.threshold",
    "smartspec": "specserve.policies.smartspec",
    "adaspec_released": "specserve.policies.adaspec",
    "adaspec_repaired": "specserve.policies.adaspec",
    "adaptive_verification": "specserve.policies.adaptive_verification",
}


def make_policy(config: PolicyConfig, step_time: StepTimeModel | None = None) -> Policy:
    """Make the policy that `config.name` names.

    Args:
        step_time: the predictor; policies that weigh time against tokens cannot do without.

    Raises:
        ValueError: unknown name, naming the known ones; or a predictor is missing.
    """
    if config.name not in POLICIES:
        raise ValueError(f"policy.name is '{config.name}': known are {', '.join(POLICIES)}")
    make: Callable[[PolicyConfig, StepTimeModel | None], Policy]
    make = import_module(POLICIES[config.name]).make
    return make(config, step_time)


def needs_profile(name: str) -> bool:
    """Say whether a policy weighs time against tokens; its module says so by NEEDS_PROFILE."""
    return name in POLICIES and getattr(import_module(POLICIES[name]), "NEEDS_PROFILE", False)


def needed(step_time: StepTimeModel | None, name: str) -> StepTimeModel:
    """Return the predictor.

    Raises:
        ValueError: if there is none.
    """
    if step_time is None:
        raise ValueError(f"policy '{name}' needs a profile: run `specserve profile`")
    return step_time
