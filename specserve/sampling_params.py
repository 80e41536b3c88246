"""What a request asks of the target's distribution: values and limits; `sampling` applies them."""

import math
from dataclasses import dataclass

MAX_SEED = 2**64 - 1
MAX_BIAS = 1e6


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of the target distribution, applied in the order of the attributes below.

    Attributes:
        logit_bias: (token id, added to its logit).
        min_tokens: `end_id` cannot be sampled before this many output tokens.
        bad_words: token sequences that are never completed.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in
            prompt or output (Keskar et al. 2019, arXiv 1909.05858).
        presence_penalty: subtracted once from tokens seen in the output.
        frequency_penalty: subtracted per occurrence in the output.
        temperature: 0 is greedy.
        min_p: drop tokens below this share of the most likely one's probability.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens that reaches this mass.
        seed: of the request's uniforms, one per output position.
        end_id: ends the output; None never does.
        return_log_probs: give log P(token) of the model itself, before any of the above.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    temperature: float = 0.0
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    end_id: int | None = None
    return_log_probs: bool = False

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            ValueError: with the value, the limit and the fix.
        """
        _check("temperature", self.temperature, 0.0, 100.0, "0 is greedy, 1 the model's own")
        _check("top_k", self.top_k, 0, 2**31 - 1, "0 keeps all tokens")
        _check("top_p", self.top_p, 0.0, 1.0, "1 keeps all tokens", open_low=True)
        _check("min_p", self.min_p, 0.0, 1.0, "0 keeps all tokens")
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "1 is off")
        _check("presence_penalty", self.presence_penalty, -100.0, 100.0, "0 is off")
        _check("frequency_penalty", self.frequency_penalty, -100.0, 100.0, "0 is off")
        _check("min_tokens", self.min_tokens, 0, 2**31 - 1, "0 is off")
        _check("seed", self.seed, 0, MAX_SEED, "leave it out for a random one")
        total: dict[int, float] = {}
        for token_id, bias in self.logit_bias:
            total[token_id] = total.get(token_id, 0.0) + bias
            if not (abs(total[token_id]) <= MAX_BIAS or total[token_id] == -math.inf):
                raise ValueError(
                    f"embedding_bias_weights and logit_bias_values add {total[token_id]} to token "
                    f"{token_id}: must be in [-{MAX_BIAS:g}, {MAX_BIAS:g}], or -inf for never "
                    "(100 all but decides)"
                )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def changes_logits(self) -> bool:
        """Whether anything before the temperature is set."""
        return bool(self.logit_bias or self.min_tokens or self.bad_words or self.has_penalties)

    @property
    def has_penalties(self) -> bool:
        """Whether past tokens change the distribution."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _check(
    name: str, value: float, low: float, high: float, fix: str, *, open_low: bool = False
) -> None:
    if math.isnan(value) or not low <= value <= high or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} is {value}: must be in {bracket}{low}, {high}] ({fix})")
