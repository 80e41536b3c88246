"""The clients that people have, unmodified, against a real server: the compatibility matrix."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from endpoint import MODEL, Endpoint
from server_client import Reference, wait_until_idle

from specserve.launch.calls import openai_call
from specserve.launch.installation import find_installation

pytestmark = [
    pytest.mark.triton,
    pytest.mark.openvino,
    pytest.mark.skipif(find_installation() is None, reason="nvidia-pytriton is not installed"),
]

AIPERF = Path(sys.prefix) / "clients" / "bin" / "aiperf"
CODE = "import os\nimport sys\n\ndef main(argv):\n    "
TURNS: list[Any] = [{"role": "user", "content": "class A"}]
CHAT_PROMPT = "user: class A\nassistant:"


@pytest.fixture(scope="module")
def reference(demo_engines: Path) -> Reference:
    return Reference(demo_engines)


@pytest.fixture(scope="module")
def plain(reference: Reference) -> str:
    """What plain decoding makes of `CODE` in 24 tokens."""
    return reference.texts([CODE], 24)[0]


@pytest.fixture(scope="module")
def chat(reference: Reference) -> str:
    """What plain decoding answers to `TURNS` in 24 tokens."""
    return reference.texts([CHAT_PROMPT], 24)[0]


# -- the official Python client ----------------------------------------------------------------


def client_of(endpoint: Endpoint) -> openai.OpenAI:
    http = httpx.Client(trust_env=False)
    return openai.OpenAI(
        base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0, http_client=http
    )


def test_openai_python_completes_and_streams(endpoint: Endpoint, plain: str) -> None:
    with client_of(endpoint) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        body: dict[str, Any] = {"model": MODEL, "prompt": CODE, "max_tokens": 24, "temperature": 0}
        whole = client.completions.create(**body, logprobs=0)
        assert whole.choices[0].text == plain
        assert whole.choices[0].logprobs is not None
        assert len(whole.choices[0].logprobs.tokens or []) == 24
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 24
        events = list(client.completions.create(**body, stream=True))
        assert "".join(event.choices[0].text for event in events) == plain
        assert events[-1].choices[0].finish_reason == "length"


def test_openai_python_chats_and_streams(endpoint: Endpoint, chat: str) -> None:
    body: dict[str, Any] = {"model": MODEL, "messages": TURNS, "temperature": 0}
    with client_of(endpoint) as client:
        whole = client.chat.completions.create(**body, max_completion_tokens=24, logprobs=True)
        assert whole.choices[0].message.content == chat
        content = whole.choices[0].logprobs and whole.choices[0].logprobs.content
        assert "".join(one.token for one in content or []) == chat
        usage = {"include_usage": True}
        *events, last = client.chat.completions.create(
            **body, max_tokens=24, stream=True, stream_options=usage
        )
        assert "".join(event.choices[0].delta.content or "" for event in events) == chat
        assert last.usage is not None
        assert last.usage.completion_tokens == 24


def test_openai_python_sends_what_is_ours_in_extra_body(endpoint: Endpoint) -> None:
    ours = {"speculation": True, "draft_source": "none", "slo_ttft_ms": 60000, "top_k": 5}
    with client_of(endpoint) as client:
        whole = client.completions.create(
            model=MODEL, prompt=CODE, max_tokens=4, seed=1, extra_body=ours
        )
    (choice,) = whole.choices
    assert choice.speculation["verified_draft_tokens"] == 0  # type: ignore[attr-defined]


def test_openai_python_raises_the_errors_it_has_names_for(endpoint: Endpoint) -> None:
    late = {"x-slo-ttft-ms": "0.001", "x-slo-class": "interactive"}
    with client_of(endpoint) as client:
        with pytest.raises(openai.BadRequestError, match="limit of 4096") as bad:
            client.completions.create(model=MODEL, prompt=CODE, max_tokens=5000)
        assert bad.value.param == "prompt"
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model="other", prompt=CODE)
        busy = client.completions.create(model=MODEL, prompt=CODE, max_tokens=2000, stream=True)
        next(iter(busy))  # an idle server lets everybody in
        with busy, pytest.raises(openai.RateLimitError, match="try again"):
            client.completions.create(model=MODEL, prompt=CODE, extra_headers=late)


def test_openai_python_async_leaves_streams_and_nothing_stays(
    endpoint: Endpoint, plain: str
) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": CODE, "temperature": 0, "stream": True}

    async def run() -> list[str]:
        http = httpx.AsyncClient(trust_env=False)
        async with openai.AsyncOpenAI(
            base_url=f"{endpoint.url}/v1", api_key="none", http_client=http
        ) as client:

            async def leave() -> None:
                stream = await client.completions.create(**body, max_tokens=3500)
                async with stream:
                    await anext(aiter(stream))

            async def stay() -> str:
                stream = await client.completions.create(**body, max_tokens=24)
                return "".join([event.choices[0].text async for event in stream])

            texts = asyncio.gather(*(stay() for _ in range(4)))
            await asyncio.gather(*(leave() for _ in range(8)))
            return list(await texts)

    assert asyncio.run(run()) == [plain] * 4
    wait_until_idle(endpoint.server)


# -- curl --------------------------------------------------------------------------------------


def test_the_curl_call_that_is_printed_works(endpoint: Endpoint) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    call = openai_call("127.0.0.1", endpoint.port, MODEL, has_tls=False, has_keys=False)
    command = call.split("\n\n")[0].replace("curl ", "curl -sS --noproxy '*' ", 1)
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    *events, done = (line for line in shown.stdout.splitlines() if line)
    assert done == "data: [DONE]", shown
    texts = [json.loads(one.removeprefix("data: "))["choices"][0]["text"] for one in events]
    assert len("".join(texts)) > 20


# -- LiteLLM, by way of Triton's own generate endpoint -----------------------------------------


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """LiteLLM as it is, without its look for prices on the network."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    return pytest.importorskip("litellm")


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_litellm_triton_provider(endpoint: Endpoint, litellm: Any, model: str) -> None:
    base = f"http://127.0.0.1:{endpoint.server.http_port}/v2/models/{model}/generate"
    call = {"model": f"triton/{model}", "messages": TURNS, "api_base": base, "max_tokens": 24}
    whole = litellm.completion(**call).choices[0].message.content
    assert len(whole) > 20
    events = list(litellm.completion(**call, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events) == whole


def test_litellm_openai_provider(endpoint: Endpoint, litellm: Any, chat: str) -> None:
    call = {"model": f"openai/{MODEL}", "messages": TURNS, "max_tokens": 24, "temperature": 0}
    call |= {"api_base": f"{endpoint.url}/v1", "api_key": "none"}
    assert litellm.completion(**call).choices[0].message.content == chat
    events = list(litellm.completion(**call, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events) == chat


# -- aiperf ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_aiperf_profiles_a_stream(
    endpoint: Endpoint, demo_engines: Path, tmp_path: Path, kind: str
) -> None:
    if not AIPERF.is_file():
        pytest.skip(f"{AIPERF} is not installed: make clients")
    arguments = {
        "model": MODEL,
        "tokenizer": demo_engines / "target",
        "endpoint-type": kind,
        "url": endpoint.url,
        "request-count": 6,
        "concurrency": 2,
        "workers-max": 1,
        "record-processors": 1,
        "synthetic-input-tokens-mean": 20,
        "output-tokens-mean": 12,
        "extra-inputs": "ignore_eos:true",
        "output-artifact-dir": tmp_path,
        "ui": "none",
    }
    command = [str(AIPERF), "profile", "--streaming"]
    command += [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
    started_s = time.monotonic()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (report,) = tmp_path.rglob("profile_export_aiperf.json")
    told = json.loads(report.read_text(encoding="utf-8"))
    assert told["request_count"]["avg"] == 6
    assert told["output_sequence_length"]["avg"] > 5
    assert 0.0 < told["time_to_first_token"]["avg"] < 1000 * (time.monotonic() - started_s)
    assert not told.get("error_summary")
