"""The target on an executor: one wave of requests verifies a step, each row at its own length."""

import logging
from collections.abc import Sequence
from typing import Any

from specserve import sampling
from specserve.batch import Batch, Row, Verified
from specserve.config import Config
from specserve.engines import EngineLost
from specserve.engines.tensorrt_llm import binding, limits
from specserve.engines.tensorrt_llm.executor import Answer, Executor
from specserve.engines.tensorrt_llm.executor_config import make_executor_config
from specserve.engines.tensorrt_llm.requests import Requests
from specserve.engines.tensorrt_llm.sequences import Sequences
from specserve.manifest import Compiled

logger = logging.getLogger(__name__)

MAX_BAD_CALLS = 3  # in a row, with an error for every request: then it is not the requests' fault


def load(config: Config) -> "TensorRTLLMTargetEngine":
    """Load the target engine that the configuration names.

    Raises:
        ValueError: with the fix.
    """
    api = binding.load()
    folder, manifest, compiled = limits.load_role(config, "target")
    options = config.tensorrt_llm
    requests = Requests(api, compiled.vocab_rows, options.prompt_ignore_length)
    requests.check()
    executor = Executor(
        api,
        folder,
        make_executor_config(api, config, "target", compiled),
        role="target",
        timeout_s=config.server.target_timeout_s,
    )
    return TensorRTLLMTargetEngine(
        executor,
        requests,
        compiled,
        vocab_size=manifest.vocab_size,
        sends_chunks=options.sends_chunks,
    )


class TensorRTLLMTargetEngine:
    """A target model behind the `TargetEngine` protocol.

    A row whose prompt is incomplete is only remembered, unless chunks are sent: the whole prompt
    goes out with its last chunk.

    Attributes:
        num_computed_tokens: see `TargetEngine`.
    """

    def __init__(
        self,
        executor: Executor,
        requests: Requests,
        compiled: Compiled,
        *,
        vocab_size: int,
        sends_chunks: bool = False,
    ) -> None:
        self._executor = executor
        self._requests = requests
        self._compiled = compiled
        self._vocab_size = vocab_size
        self._sends_chunks = sends_chunks
        self._sequences = Sequences()
        self._num_bad_calls = 0
        self._counts_lag = False
        self.num_computed_tokens: int | None = None

    def verify(self, batch: Batch, chosen: Sequence[Sequence[int]]) -> list[Verified]:
        """Verify all rows as one wave. See `TargetEngine`.

        A row that the executor refuses, or whose beginning is not here, has failed.

        Raises:
            EngineLost: if the executor is gone, gives no answer, or refuses everything.
        """
        outputs = [Verified() for _ in batch.rows]
        wave: dict[int, tuple[list[int], list[int]]] = {}
        for i, (row, draft) in enumerate(zip(batch.rows, chosen, strict=True)):
            sequence = self._sequences.put(row.key, row.num_computed_tokens, row.token_ids)
            reason = self._why_not(row, sequence)
            if sequence is None or reason:
                outputs[i] = _failure(row, reason)
            elif row.samples or self._sends_chunks:
                wave[i] = sequence, self._draft_of(row, len(sequence), draft)
        answers = self._executor.run([self._request(batch.rows[i], *wave[i]) for i in wave])
        self._watch_errors(answers)
        for i, answer in zip(wave, answers, strict=True):
            outputs[i] = self._verified(batch.rows[i], wave[i][1], answer)
        self._count(list(wave.values()))
        return outputs

    def release(self, keys: Sequence[int]) -> None:
        """Forget sequences; the executor evicts their blocks in time."""
        self._sequences.release(keys)
        self._requests.release(keys)

    def close(self) -> None:
        """End the executor."""
        self._executor.close()

    def _why_not(self, row: Row, sequence: list[int] | None) -> str:
        if sequence is None:
            return f"its first {row.num_computed_tokens} tokens are not here: the engine is new"
        limit = self._compiled.max_input_len
        if len(sequence) > limit:
            return f"it has {len(sequence)} tokens, the engine was built for {limit}"
        return ""

    def _draft_of(self, row: Row, num_tokens: int, chosen: Sequence[int]) -> list[int]:
        """Return what of a draft can be verified without harm: of sampled rows nothing."""
        assert row.samples or not chosen, f"request {row.key} drafts inside its prompt"
        if not row.sampling.is_greedy:
            return []
        engine = self._compiled
        return list(chosen[: min(engine.max_draft_len, engine.max_input_len - num_tokens)])

    def _request(self, row: Row, sequence: list[int], draft: list[int]) -> Any:
        if not row.samples:
            return self._requests.compute(sequence)
        return self._requests.verify(row, sequence, draft)

    def _verified(self, row: Row, draft: list[int], answer: Answer) -> Verified:
        if answer.error:
            return _failure(row, answer.error)
        if not row.samples:
            return Verified()
        end_id, said = row.sampling.end_id, answer.token_ids
        if answer.has_ended and end_id is not None and said[-1:] != [end_id]:
            said = [*said, end_id]  # the executor leaves it out
        output = sampling.agree(said, draft)
        if not output or max(output) >= self._vocab_size:
            return _failure(row, f"the engine said {output}")
        self._sequences.append(row.key, output[:-1])
        return Verified(output)

    def _watch_errors(self, answers: Sequence[Answer]) -> None:
        """Tell an engine that fails at everything from one that refuses a request."""
        if answers:
            is_bad = all(answer.error for answer in answers)
            self._num_bad_calls = self._num_bad_calls + 1 if is_bad else 0
        if self._num_bad_calls >= MAX_BAD_CALLS:
            logger.error("the target executor refuses everything: %s", answers[0].error)
            raise EngineLost("the target engine fails at every request: try again")

    def _count(self, wave: Sequence[tuple[list[int], list[int]]]) -> None:
        """Note what the executor computed: more than it was given where cached blocks had gone.

        Its statistics may come late; a count that cannot be true, or that follows one that came
        short, is not used.
        """
        counted = self._executor.num_computed_tokens() if wave else 0
        least = sum(1 + len(draft) for _, draft in wave)
        most = sum(len(sequence) + len(draft) for sequence, draft in wave)
        lagged, self._counts_lag = self._counts_lag, counted is not None and counted < least
        is_good = counted is not None and least <= counted <= most and not lagged
        self.num_computed_tokens = counted if is_good else None


def _failure(row: Row, reason: str) -> Verified:
    logger.error("verifying request %d failed: %s", row.key, reason)
    return Verified(failed=True)
