"""The TensorRT-LLM engines behind the shipped model repository, on a real tritonserver.

The bindings are the stand-in of the contract tests, installed where the engines are.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from paged_lm import PagedLM, plain_decode
from server_client import generate, grpc_many, grpc_one, wait_until

from bench.served import REPOSITORY, Served, serving
from specserve.config import DEMO_PAIR
from specserve.launch.installation import find_installation
from specserve.sampling_params import SamplingParams
from specserve.text import TextStream, encode, load_tokenizer

pytest.importorskip("torch")
write_engine = pytest.importorskip("test_tensorrt_llm").write_engine

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(find_installation() is None, reason="nvidia-pytriton is not installed"),
]

VOCAB_SIZE = 4096  # of the demo pair's tokenizer
MAX_TOKENS = 12
MODEL = """
import sys
from pathlib import Path

import pytest

sys.path.insert(0, {tests!r})
import fake_tensorrt_llm as fake
from paged_lm import PagedLM

ENGINES = {{
    "target": fake.Engine(PagedLM(vocab_size={vocab_size}), max_draft_len=8, pad=3),
    "draft": fake.Engine(PagedLM(vocab_size={vocab_size}, noise=0.001), pad=3),
}}
def fail_where_it_should():
    if Path({fault!r}).exists():
        raise RuntimeError("an MPI rank is gone")

ENGINES["target"].spend = fail_where_it_should
fake.install(pytest.MonkeyPatch(), fake.make_module(ENGINES))
from python_backend.engine_model import {role} as TritonPythonModel
"""


def options(folder: Path) -> list[str]:
    """Write a pair that the demo tokenizer belongs to; return the options that choose it."""
    for role, max_draft_len in (("draft", 0), ("target", 8)):
        values = {"max_draft_len": max_draft_len, "vocab_rows": VOCAB_SIZE + 3}
        write_engine(folder / role, VOCAB_SIZE, values)
        shutil.copy(DEMO_PAIR / role / "tokenizer.json", folder / role)
    return [
        "engine.name=tensorrt_llm", f"engine.dir={folder}", "scheduler.max_num_seqs=16",
        "telemetry.source=none", "policy.name=fixed", "policy.draft_source=model",
    ]  # fmt: skip


def repository_with_stand_in(folder: Path) -> Path:
    """Copy the model repository, with the bindings installed in the models that need them."""
    repository = folder / "repository"
    shutil.copytree(REPOSITORY, repository)
    for name, role in (("draft", "DraftModel"), ("target", "TargetModel")):
        tests = str(Path(__file__).parent)
        fault = str(folder / "fault")
        text = MODEL.format(tests=tests, fault=fault, vocab_size=VOCAB_SIZE, role=role)
        (repository / name / "1" / "model.py").write_text(text)
    return repository


def expected_text(prompt: str) -> str:
    tokenizer = load_tokenizer(DEMO_PAIR / "target")
    model = PagedLM(vocab_size=VOCAB_SIZE)
    token_ids = plain_decode(model, encode(tokenizer, prompt), MAX_TOKENS, SamplingParams())
    text = TextStream(tokenizer)
    return text.push(token_ids) + text.finish()


def test_texts_are_plain_decodings_and_refusals_name_the_parameter(tmp_path: Path) -> None:
    prompts = ["import os", "class A:", "def f(x):\n    return"]
    requests = [
        {"text_input": p, "max_tokens": MAX_TOKENS, "stream": True, "end_id": VOCAB_SIZE - 1}
        for p in prompts
    ]
    repository = repository_with_stand_in(tmp_path)
    with serving(options(tmp_path / "pair"), repository=repository) as server:
        answers = grpc_many(server, "ensemble", requests, concurrency=3)
        check_refusal(server)
        wait_until(lambda: num_accepted(server) > 0, "accepted tokens are counted", timeout_s=10.0)
        check_loss(server, tmp_path / "fault")
    assert [answer.text for answer in answers] == [expected_text(prompt) for prompt in prompts]


def num_accepted(server: Served) -> float:
    return sum(v for name, v in server.metrics().items() if "accepted_tokens_total" in name)


def check_refusal(server: Served) -> None:
    answer = grpc_one(server, "ensemble", text_input="a", max_tokens=2, temperature=1.0, min_p=0.1)
    assert answer.error is not None
    assert "min_p is 0.1: tensorrt_llm ignores it" in answer.error
    status, body = generate(
        server, "ensemble", text_input="a", max_tokens=2, temperature=1.0, min_p=0.1
    )
    assert status == 400
    assert "min_p is 0.1" in body["error"]


def check_loss(server: Served, fault: Path) -> None:
    """An executor that stops fails what is in flight, and the target model is loaded again."""
    fault.touch()
    answer = grpc_one(server, "ensemble", text_input="a", max_tokens=2)
    assert answer.error is not None
    assert "the target model is being loaded again: try again" in answer.error
    fault.unlink()

    def is_back() -> bool:
        return grpc_one(server, "ensemble", text_input="a", max_tokens=2).error is None

    wait_until(is_back, "the target model is loaded again", timeout_s=60.0)


def test_without_tensorrt_llm_the_server_does_not_start_and_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(Exception, match=r"run in an image with TensorRT-LLM 1\.2\.1") as failure,
        serving(options(tmp_path)),
    ):
        pass
    lines = [line for line in str(failure.value).splitlines() if "TensorRT-LLM" in line]
    assert all("engine.name is 'tensorrt_llm'" in line for line in lines)
