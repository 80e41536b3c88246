"""The torch engine behind the shipped model repository, on a real tritonserver."""

from __future__ import annotations

import pytest
from server_client import Reference, grpc_many, wait_until

from bench.prompts import held_out_prompts
from bench.served import serving
from specserve.config import CHECKPOINTS
from specserve.launch.installation import find_installation

pytestmark = [
    pytest.mark.triton,
    pytest.mark.torch,
    pytest.mark.skipif(find_installation() is None, reason="nvidia-pytriton is not installed"),
]
pytest.importorskip("torch")
pytest.importorskip("transformers")

MAX_TOKENS = 10
ENGINE = ("engine.name=torch", "engine.num_threads=1")


def test_served_text_is_plain_decodings() -> None:
    """Greedy and with a seed, four streams at once, with sampled and greedy drafts."""
    reference = Reference(CHECKPOINTS, *ENGINE)
    windows = held_out_prompts(reference.tokenizer, 2, 24)
    prompts = [reference.tokenizer.decode(window) for window in windows]
    samplings = [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 7}]
    expected = [
        text for values in samplings for text in reference.texts(prompts, MAX_TOKENS, **values)
    ]
    requests = [
        {"text_input": prompt, "max_tokens": MAX_TOKENS, "stream": True, **values}
        for values in samplings
        for prompt in prompts
    ]
    policy = ["policy.name=fixed", "policy.draft_source=model"]  # which needs no profile
    with serving([*ENGINE, *policy]) as server:
        answers = grpc_many(server, "ensemble", requests, concurrency=4)
        accepted = "specserve_accepted_tokens_total"
        wait_until(lambda: server.metrics()[accepted] > 0, "draft tokens are accepted")
    assert [answer.text for answer in answers] == expected
