"""Batches as a few small arrays, for engines in another process. Knows neither Triton nor models.

One INT32 row of counts per request, and everything of variable length laid end to end.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Batch, Draft, Row, Verified
from specserve.sampling_params import SamplingParams
from specserve.stop_rules import StopRule, decode_rule, encode_rule

MAX_TOP_K = 2**24  # beyond any vocabulary, and exact in FP32
FAILED = UNKNOWN = -1  # in place of a number of tokens
Arrays = dict[str, NDArray[Any]]


# -- draft: request ----------------------------------------------------------------------------


def encode_draft_request(
    rows: Sequence[Row], rule: StopRule | None, released: Sequence[int] = ()
) -> Arrays:
    """Pack rows that draft; `rule` has one entry for each of them."""
    counts = [
        (r.key, r.num_draft_computed_tokens, len(r.catch_up_token_ids), r.max_draft_tokens,
         len(r.block_table), r.num_prompt_tokens, r.is_draft_sampled)
        for r in rows
    ]  # fmt: skip
    arrays: Arrays = {
        "rows": np.array(counts, dtype=np.int32),
        "token_ids": _ints(token_id for r in rows for token_id in r.catch_up_token_ids),
        "block_ids": _ints(block_id for r in rows for block_id in r.block_table),
    }
    if rule is not None:
        arrays["stop_rule"] = encode_rule(rule)
    sampled = [r.sampling for r in rows if r.is_draft_sampled]
    if sampled:
        arrays["seeds"] = np.array([p.seed for p in sampled], dtype=np.uint64)
        arrays["sampling"] = np.array(
            [(p.temperature, p.min_p, min(p.top_k, MAX_TOP_K), p.top_p) for p in sampled],
            dtype=np.float32,
        )
    if released:
        arrays["released"] = _ints(released)
    return arrays


def decode_draft_request(arrays: Mapping[str, NDArray[Any]]) -> Batch:
    """Unpack what `encode_draft_request` packed."""
    token_ids, block_ids = arrays["token_ids"].tolist(), arrays["block_ids"].tolist()
    samplings = _decode_samplings(arrays)
    rows, token, block = [], 0, 0
    for key, start, num_tokens, cap, num_blocks, num_prompt, is_sampled in arrays["rows"].tolist():
        rows.append(
            Row(
                key=key,
                num_computed_tokens=0,
                token_ids=[],
                samples=True,
                block_table=block_ids[block : block + num_blocks],
                num_prompt_tokens=num_prompt,
                sampling=next(samplings) if is_sampled else SamplingParams(),
                is_draft_sampled=bool(is_sampled),
                max_draft_tokens=cap,
                num_draft_computed_tokens=start,
                catch_up_token_ids=token_ids[token : token + num_tokens],
            )
        )
        token, block = token + num_tokens, block + num_blocks
    rule = decode_rule(arrays["stop_rule"]) if "stop_rule" in arrays else None
    return Batch(rows, rule)


def decode_released(arrays: Mapping[str, NDArray[Any]]) -> list[int]:
    """Return the keys to release before a draft or a verification runs."""
    released: list[int] = arrays["released"].tolist() if "released" in arrays else []
    return released


def _decode_samplings(arrays: Mapping[str, NDArray[Any]]) -> Iterator[SamplingParams]:
    """Yield what of the parameters a draft heeds, of the rows that are sampled."""
    if "seeds" not in arrays:
        return
    for seed, numbers in zip(arrays["seeds"].tolist(), arrays["sampling"].tolist(), strict=True):
        temperature, min_p, top_k, top_p = numbers
        yield SamplingParams(
            temperature=temperature, min_p=min_p, top_k=int(top_k), top_p=top_p, seed=seed
        )


# -- draft: response ---------------------------------------------------------------------------


def encode_drafts(drafts: Sequence[Draft]) -> Arrays:
    """Pack proposals."""
    return {
        "num_tokens": _ints(len(d.token_ids) for d in drafts),
        "token_ids": _ints(token_id for d in drafts for token_id in d.token_ids),
        "confidences": np.array([c for d in drafts for c in d.confidences], dtype=np.float32),
    }


def decode_drafts(arrays: Mapping[str, NDArray[Any]]) -> list[Draft]:
    """Unpack what `encode_drafts` packed."""
    token_ids, confidences = arrays["token_ids"].tolist(), arrays["confidences"].tolist()
    drafts, begin = [], 0
    for length in arrays["num_tokens"].tolist():
        end = begin + length
        drafts.append(Draft(token_ids[begin:end], confidences[begin:end]))
        begin = end
    return drafts


# -- verify: request ---------------------------------------------------------------------------


def encode_verify_request(
    batch: Batch, chosen: Sequence[Sequence[int]], new_keys: set[int], released: Sequence[int]
) -> Arrays:
    """Pack a verification; sampling parameters travel only for `new_keys`."""
    rows = batch.rows
    counts = [
        (r.key, r.num_computed_tokens, len(r.token_ids), len(draft), r.samples, len(r.block_table))
        for r, draft in zip(rows, chosen, strict=True)
    ]
    arrays: Arrays = {
        "rows": np.array(counts, dtype=np.int32),
        "token_ids": _ints(
            token_id
            for r, draft in zip(rows, chosen, strict=True)
            for token_id in (*r.token_ids, *draft)
        ),
        "block_ids": _ints(block_id for r in rows for block_id in r.block_table),
    }
    new = [
        {"key": r.key, "num_prompt_tokens": r.num_prompt_tokens, **dataclasses.asdict(r.sampling)}
        for r in rows
        if r.key in new_keys
    ]
    if new:
        arrays["new_requests"] = np.array([json.dumps(new).encode()], dtype=object)
    if released:
        arrays["released"] = _ints(released)
    return arrays


class VerifyDecoder:
    """Unpacks verifications; remembers the parameters of the requests it has seen."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[SamplingParams, int]] = {}

    def __call__(
        self, arrays: Mapping[str, NDArray[Any]]
    ) -> tuple[Batch, list[list[int]], list[int]]:
        """Return batch, chosen tokens of each row, and keys to release before it runs.

        Raises:
            ValueError: a row of a request whose parameters never came.
        """
        released = self._forget(arrays)  # first: a preempted request may come back in this call
        self._learn(arrays)
        token_ids, block_ids = arrays["token_ids"].tolist(), arrays["block_ids"].tolist()
        rows, chosen, token, block = [], [], 0, 0
        for key, start, num_base, num_chosen, samples, num_blocks in arrays["rows"].tolist():
            if key not in self._known:
                raise ValueError(f"request {key} is unknown here: the engine was restarted")
            sampling, num_prompt_tokens = self._known[key]
            draft_begin = token + num_base
            rows.append(
                Row(
                    key=key,
                    num_computed_tokens=start,
                    token_ids=token_ids[token:draft_begin],
                    samples=bool(samples),
                    block_table=block_ids[block : block + num_blocks],
                    num_prompt_tokens=num_prompt_tokens,
                    sampling=sampling,
                )
            )
            chosen.append(token_ids[draft_begin : draft_begin + num_chosen])
            token, block = draft_begin + num_chosen, block + num_blocks
        return Batch(rows), chosen, released

    def _learn(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        if "new_requests" not in arrays:
            return
        for entry in json.loads(arrays["new_requests"].flat[0]):
            key, num_prompt_tokens = entry.pop("key"), entry.pop("num_prompt_tokens")
            entry["logit_bias"] = tuple(map(tuple, entry["logit_bias"]))
            entry["bad_words"] = tuple(map(tuple, entry["bad_words"]))
            self._known[key] = SamplingParams(**entry), num_prompt_tokens

    def _forget(self, arrays: Mapping[str, NDArray[Any]]) -> list[int]:
        released = decode_released(arrays)
        for key in released:
            self._known.pop(key, None)
        return released


# -- verify: response --------------------------------------------------------------------------


def encode_verified(outputs: Sequence[Verified], num_computed_tokens: int | None = None) -> Arrays:
    """Pack results; log-probabilities of a row are either complete or absent.

    Args:
        num_computed_tokens: see `TargetEngine`.
    """
    return {
        "computed_tokens": _ints([UNKNOWN if num_computed_tokens is None else num_computed_tokens]),
        "num_tokens": _ints(FAILED if v.failed else len(v.output_token_ids) for v in outputs),
        "token_ids": _ints(token_id for v in outputs for token_id in v.output_token_ids),
        "num_log_probs": _ints(len(v.log_probs) for v in outputs),
        "log_probs": np.array([x for v in outputs for x in v.log_probs], dtype=np.float32),
    }


def decode_count(arrays: Mapping[str, NDArray[Any]]) -> int | None:
    """Return how many tokens the target computed, None if it cannot tell."""
    count: int = arrays["computed_tokens"].item()
    return None if count == UNKNOWN else count


def decode_verified(arrays: Mapping[str, NDArray[Any]]) -> list[Verified]:
    """Unpack what `encode_verified` packed."""
    token_ids, log_probs = arrays["token_ids"].tolist(), arrays["log_probs"].tolist()
    outputs, token, value = [], 0, 0
    for num_tokens, num_values in zip(
        arrays["num_tokens"].tolist(), arrays["num_log_probs"].tolist(), strict=True
    ):
        if num_tokens == FAILED:
            outputs.append(Verified(failed=True))
            continue
        outputs.append(
            Verified(token_ids[token : token + num_tokens], log_probs[value : value + num_values])
        )
        token, value = token + num_tokens, value + num_values
    return outputs


def _ints(values: Any) -> NDArray[np.int32]:
    return np.array(list(values), dtype=np.int32)
