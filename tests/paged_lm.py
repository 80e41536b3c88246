"""A language model small enough to enumerate, behind the `PagedModel` seam, and its plain decoding.

Its KV cache holds token ids and positions, written and read through block tables as paged attention
does it, and its logits are a hash of the whole context read back. So every mistake in block tables,
catch-up or rollback either trips an assertion here or changes the output. What the output must be
is said by `plain_decode`, one token at a time and from the definitions.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from bench.reference import reference_logits, reference_probs
from specserve.engines.paged_model import FlatBatch
from specserve.sampling import Noise
from specserve.sampling_params import SamplingParams

Array = NDArray[np.float32]
UNWRITTEN = -1
SPREAD = 5.0  # logits are uniform in [0, SPREAD)
MAX_CONTEXT = 4096
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class PagedLM:
    """A deterministic paged model.

    Args:
        scale: of the logits; negative reverses every preference.
        noise: how far, at most, a second hash moves each logit; 0 is the model of this seed itself.

    Attributes:
        num_calls, num_fed_tokens: forward passes, and tokens in them.
        num_failures: passes that failed on purpose.
        spend: called once a pass, to move a clock.
    """

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        *,
        vocab_size: int = 17,
        seed: int = 0,
        scale: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.seed = seed
        self.scale = scale
        self.noise = noise
        self.num_calls = 0
        self.num_fed_tokens = 0
        self.num_failures = 0
        self.spend: Callable[[], None] = lambda: None
        self._token_ids = np.full((num_blocks, block_size), UNWRITTEN, dtype=np.int64)
        self._positions = np.full((num_blocks, block_size), UNWRITTEN, dtype=np.int64)

    def forward(self, batch: FlatBatch, logit_rows: NDArray[np.int64]) -> Array:
        """Write the batch's tokens, read each context back, and hash it. See `PagedModel`."""
        self.num_calls += 1
        self.spend()
        self.num_fed_tokens += len(batch.token_ids)
        assert len(set(batch.block_ids.tolist())) == len(batch.block_ids), "a block in two tables"
        spans = range(len(batch.starts))
        for i in spans:
            self._write(batch, i)
        hashes = np.concatenate([self._read(batch, i) for i in spans])
        return self._logits(hashes[logit_rows])

    def logits(self, context: Sequence[int]) -> Array:
        """Return the logits [vocab_size] of what follows a context, without any cache."""
        return self._logits(_hashes(np.array(context, dtype=np.int64))[-1:])[0]

    def scrub(self, block_ids: Iterable[int], first_slot: int = 0) -> None:
        """Forget the slots of these blocks from `first_slot` on, counted over all of them."""
        for i, block_id in enumerate(block_ids):
            offset = max(0, first_slot - i * self.block_size)
            self._token_ids[block_id, offset:] = UNWRITTEN
            self._positions[block_id, offset:] = UNWRITTEN

    def _write(self, batch: FlatBatch, i: int) -> None:
        begin, end = batch.begins[i], batch.begins[i + 1]
        positions = np.arange(batch.starts[i], batch.starts[i] + end - begin)
        assert (batch.positions[begin:end] == positions).all(), "positions do not follow the start"
        blocks, offsets = self._slots(batch, i, positions)
        self._token_ids[blocks, offsets] = batch.token_ids[begin:end]
        self._positions[blocks, offsets] = positions

    def _read(self, batch: FlatBatch, i: int) -> NDArray[np.uint64]:
        """Return the hash of the context that ends with each token of a span."""
        num_new = batch.begins[i + 1] - batch.begins[i]
        assert num_new > 0, f"span {i} is empty"
        positions = np.arange(batch.starts[i] + num_new)
        assert len(positions) <= batch.max_context_len
        blocks, offsets = self._slots(batch, i, positions)
        found = self._positions[blocks, offsets]
        assert (found == positions).all(), (
            f"span {i} reads slots that nobody wrote for it: positions {found.tolist()}"
        )
        return _hashes(self._token_ids[blocks, offsets])[batch.starts[i] :]

    def _slots(self, batch: FlatBatch, i: int, positions: NDArray[np.int64]) -> tuple[Array, Array]:
        table = batch.block_ids[batch.block_begins[i] : batch.block_begins[i + 1]]
        covered = len(table) * self.block_size
        assert len(positions) == 0 or positions[-1] < covered, (
            f"span {i} reaches position {positions[-1]}, its block table covers {covered}"
        )
        return table[positions // self.block_size], positions % self.block_size

    def _logits(self, hashes: NDArray[np.uint64]) -> Array:
        logits = self.scale * SPREAD * _uniforms(hashes, self.seed, self.vocab_size)
        if self.noise:
            logits += self.noise * (2 * _uniforms(hashes, self.seed + 1, self.vocab_size) - 1)
        return logits.astype(np.float32)


class FlakyLM(PagedLM):
    """Fails on a seeded share of its calls, half of them after it has written its cache."""

    def __init__(self, *args: int, failure_rate: float, **kwargs: float) -> None:
        super().__init__(*args, **kwargs)
        self.failure_rate = failure_rate
        self._random = np.random.default_rng(0)

    def forward(self, batch: FlatBatch, logit_rows: NDArray[np.int64]) -> Array:
        """Run, or raise."""
        fails, late = self._random.random(2) < (self.failure_rate, 0.5)
        self.num_failures += int(fails)
        if fails and not late:
            raise RuntimeError("the model failed before it wrote")
        logits = super().forward(batch, logit_rows)
        if fails:
            raise RuntimeError("the model failed after it wrote")
        return logits


def plain_decode(
    model: PagedLM, prompt: Sequence[int], max_tokens: int, params: SamplingParams
) -> list[int]:
    """Return what the model says, one token at a time and without a cache."""
    noise = Noise(model.vocab_size)
    token_ids = list(prompt)
    for i in range(max_tokens):
        logits = reference_logits(model.logits(token_ids), params, token_ids, len(prompt))
        if params.is_greedy:
            token_ids.append(int(logits.argmax()))
        else:
            times = noise.rows(params.seed, i, i + 1)[0].tolist()
            token_ids.append(_first(reference_probs(logits, params).tolist(), times))
        if token_ids[-1] == params.end_id:
            break
    return token_ids[len(prompt) :]


def _first(probs: Sequence[float], times: Sequence[float]) -> int:
    """Return who arrives first, each of `times` divided by a speed."""
    arrivals = [time / prob if prob else math.inf for time, prob in zip(times, probs, strict=True)]
    return min(range(len(arrivals)), key=arrivals.__getitem__)


def _hashes(token_ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a hash of every non-empty prefix, each sensitive to all tokens and their order."""
    terms = (token_ids + 1).astype(np.uint64) * _MULTIPLIERS[: len(token_ids)]
    return np.cumsum(terms, dtype=np.uint64)


def _uniforms(hashes: NDArray[np.uint64], seed: int, vocab_size: int) -> NDArray[np.float64]:
    """Return numbers [len(hashes), vocab_size] in [0, 1), by splitmix64."""
    columns = np.arange(1 + seed * vocab_size, 1 + (seed + 1) * vocab_size, dtype=np.uint64)
    z = hashes[:, None] + columns * GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    uniforms: NDArray[np.float64] = (z >> np.uint64(11)) * 2.0**-53
    return uniforms


_MULTIPLIERS = np.random.default_rng(0).integers(
    1, 2**63, MAX_CONTEXT, dtype=np.uint64
) | np.uint64(1)
