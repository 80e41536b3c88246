"""The self-check: load an engine, generate a token; on a target, verify that token as a draft.

    python3 -m build_engines.tensorrt_llm.self_check ENGINE_DIR

Runs in the interpreter that has `tensorrt_llm`, under mpirun for more than one rank.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

from specserve import manifest as manifests
from specserve.manifest import Manifest

PROMPT = tuple(range(16, 48))  # any ids do: every tokenizer has them
PATIENCE = timedelta(minutes=2)


def check_forward(engine_dir: str) -> None:
    """Load an engine, and run it as serving does.

    Raises:
        ValueError: if it answers with an error, not at all, or with what it cannot mean.
    """
    manifest = manifests.load(engine_dir)
    import tensorrt_llm.bindings.executor as trtllm

    config = trtllm.ExecutorConfig(
        max_beam_width=1,
        enable_chunked_context=True,
        kv_cache_config=trtllm.KvCacheConfig(enable_block_reuse=True, free_gpu_memory_fraction=0.5),
    )
    with trtllm.Executor(engine_dir, trtllm.ModelType.DECODER_ONLY, config) as executor:
        if executor.can_enqueue_requests():  # the first rank; the others work for it
            _check(trtllm, executor, manifest)


def _check(trtllm: Any, executor: Any, manifest: Manifest) -> None:
    (token,) = _generate(trtllm, executor, manifest, [])
    print(f"token {token} after {len(PROMPT)}", flush=True)
    if manifest.compiled is None or not manifest.compiled.max_draft_len:
        return
    verified = _generate(trtllm, executor, manifest, [token])
    if len(verified) != 2 or verified[0] != token:
        raise ValueError(
            f"draft token {token} is the target's own, and verifying it gave {verified}: "
            "must be that token and one more"
        )
    print(f"draft token {token} accepted, then {verified[1]}", flush=True)


def _generate(trtllm: Any, executor: Any, manifest: Manifest, draft: list[int]) -> list[int]:
    """Return 1 to len(draft) + 1 greedy tokens after PROMPT."""
    request = trtllm.Request(
        input_token_ids=list(PROMPT),
        max_tokens=len(draft) + 1,
        sampling_config=trtllm.SamplingConfig(top_k=1),
        output_config=trtllm.OutputConfig(exclude_input_from_output=True),
        external_draft_tokens_config=trtllm.ExternalDraftTokensConfig(draft) if draft else None,
    )
    executor.enqueue_request(request)
    responses = executor.await_responses(timeout=PATIENCE)
    if not responses:
        raise ValueError(f"no answer after {PATIENCE.seconds} s: see the log of TensorRT-LLM")
    if responses[0].has_error():
        raise ValueError(f"the executor refuses: {responses[0].error_msg}")
    tokens: list[int] = list(responses[0].result.output_token_ids[0])
    rows = manifest.compiled.vocab_rows if manifest.compiled else manifest.vocab_size
    if not 1 <= len(tokens) <= len(draft) + 1 or not all(0 <= t < rows for t in tokens):
        raise ValueError(
            f"answer is {tokens}, must be 1 to {len(draft) + 1} ids in [0, {rows}): build it again"
        )
    return tokens


def main() -> None:
    """Check one engine folder; a failure is one line and exit status 1."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        raise SystemExit(2)
    try:
        check_forward(sys.argv[1])
    except (
        ImportError,
        ValueError,
        RuntimeError,
    ) as error:  # what the bindings raise is a RuntimeError
        print(f"error: {sys.argv[1]}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
