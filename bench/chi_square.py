"""Is a sample what its distribution would give? The chi-square tests of all losslessness checks."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

MIN_EXPECTED = 5.0  # in a cell; below it the chi-square distribution is a poor approximation
GRID = 8
STRATA = (0.2, 0.4, 0.6, 0.8)  # borders of the likeliest token's probability

Floats = NDArray[np.float64]


def chi_square(counts: Mapping[Hashable, int], probs: Mapping[Hashable, float]) -> float:
    """Return the probability of counts at least as far from expectation as these, by chance.

    Outcomes expected fewer than 5 times are counted as one. An impossible outcome gives 0.

    Source: Pearson 1900.
    """
    if any(probs.get(outcome, 0.0) == 0.0 for outcome in counts):
        return 0.0
    total = sum(counts.values())
    common = [outcome for outcome, prob in probs.items() if prob * total >= MIN_EXPECTED]
    observed = [counts.get(outcome, 0) for outcome in common]
    expected = [probs[outcome] * total for outcome in common]
    rest = total - sum(expected)
    if rest > 1e-6 * total:
        observed.append(total - sum(observed))
        expected.append(rest)
    if len(observed) == 1:
        return 1.0
    return float(stats.chisquare(observed, expected).pvalue)


def transform(probs: Floats, token_id: int, uniform: float) -> float:
    """Return where a token lies in its distribution, most likely tokens first: in [0, 1).

    If the token was drawn from `probs`, and `uniform` from [0, 1), the result is uniform, whatever
    was drawn before it; a rule that favours likely tokens makes it small.

    Args:
        probs: [vocab_size].

    Returns:
        NaN if the token was impossible.

    Source: Rosenblatt 1952, the randomised probability integral transform.
    """
    prob = probs[token_id]
    if prob == 0.0:
        return float("nan")
    before = probs[probs > prob].sum() + probs[:token_id][probs[:token_id] == prob].sum()
    return float((before + uniform * prob) / probs.sum())


def independent_uniforms(texts: Sequence[Floats]) -> float:
    """Return the p-value of successive values of each text being uniform and independent.

    Pairs that do not overlap fall into GRID x GRID cells, all equally likely: one test of each
    value's distribution and of what it has to do with the one before.

    Args:
        texts: values in [0, 1), in order; NaN gives 0.
    """
    pairs = np.concatenate([text[: len(text) // 2 * 2].reshape(-1, 2) for text in texts])
    if np.isnan(pairs).any():
        return 0.0
    cells = np.minimum((pairs * GRID).astype(int), GRID - 1) @ np.array([GRID, 1])
    counts = dict(zip(*(a.tolist() for a in np.unique(cells, return_counts=True)), strict=True))
    return chi_square(counts, dict.fromkeys(range(GRID**2), 1.0 / GRID**2))


def likeliest_as_often_as_claimed(hits: NDArray[np.bool_], probs: Floats) -> float:
    """Return the p-value of the likeliest tokens having come as often as they should.

    Strata of the likeliest token's probability are tested apart, because rules that favour tokens
    with a high one are what spoils speculation. A stratum's sum of (hit - probability) over its
    standard deviation is normal in the limit, whatever each draw depends on before it (the
    martingale central limit theorem; a stratum is known before the draw).

    Args:
        hits: [n], whether the likeliest token was drawn.
        probs: [n], its probability.
    """
    stratum = np.searchsorted(STRATA, probs)
    size = len(STRATA) + 1
    variance = np.bincount(stratum, probs * (1.0 - probs), size)
    excess = np.bincount(stratum, hits - probs, size)
    used = variance >= MIN_EXPECTED
    if not used.any():
        return 1.0
    return float(stats.chi2.sf((excess[used] ** 2 / variance[used]).sum(), used.sum()))
