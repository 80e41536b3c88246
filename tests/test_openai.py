"""The OpenAI endpoint in front of a real server, asked over plain HTTP.

What is right comes from plain decoding with the same engine in this process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from endpoint import MODEL, Endpoint, client, running
from server_client import Reference, cut_at, wait_until, wait_until_idle

from bench.served import serving
from specserve.launch.installation import find_installation
from specserve.openai.translate import derived_seed

pytestmark = [
    pytest.mark.triton,
    pytest.mark.openvino,
    pytest.mark.skipif(find_installation() is None, reason="nvidia-pytriton is not installed"),
]

CODE = "import os\nimport sys\n\ndef main(argv):\n    "
GREEDY = {"prompt": CODE, "max_tokens": 24, "temperature": 0}
TURNS = [
    {"role": "system", "content": "You write Python."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "class "}, {"type": "text", "text": "A"}],
    },
]
CHAT = {"messages": TURNS, "max_tokens": 16, "temperature": 0}
CHAT_PROMPT = "system: You write Python.\nuser: class A\nassistant:"


@pytest.fixture(scope="module")
def reference(demo_engines: Path) -> Reference:
    return Reference(demo_engines)


def text(answer: httpx.Response) -> str:
    """Return the text of the only choice."""
    (choice,) = answer.json()["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def stream(endpoint: Endpoint, path: str, **body: Any) -> list[dict[str, Any]]:
    """Return the events of a stream that must end in [DONE]."""
    with (
        client(endpoint.url) as http,
        http.stream("POST", f"/v1/{path}", json={"model": MODEL, "stream": True, **body}) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert data.pop() == "[DONE]"
    return [json.loads(one) for one in data]


def check_error(answer: httpx.Response, status: int, param: str | None, *words: str) -> None:
    """Assert that an error has OpenAI's shape, names the parameter and says these words."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(word in error["message"] for word in words), error
    assert (answer.status_code, error["param"]) == (status, param), error


# -- what is generated -------------------------------------------------------------------------


def test_greedy_completion_is_plain_decodings(endpoint: Endpoint, reference: Reference) -> None:
    expected = reference.texts([CODE], 24)[0]
    assert text(endpoint.post("completions", **GREEDY)) == expected
    events = stream(endpoint, "completions", **GREEDY)
    assert len(events) > 1
    assert "".join(event["choices"][0]["text"] for event in events) == expected
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * (len(events) - 1) + ["length"]
    assert len({event["id"] for event in events}) == 1


def test_answer_names_the_request_as_the_servers_log_does(endpoint: Endpoint) -> None:
    answer = endpoint.post("completions", **GREEDY)
    name = answer.json()["id"]
    assert answer.headers["x-request-id"] == name
    log = endpoint.server.process.log
    wait_until(lambda: any(f"'{name}-0'" in line for line in log.lines()), "a line of it")


def test_chat_continues_the_rendered_template(endpoint: Endpoint, reference: Reference) -> None:
    expected = reference.texts([CHAT_PROMPT], 16)[0]
    answer = endpoint.post("chat/completions", **CHAT)
    assert text(answer) == expected
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"
    events = stream(endpoint, "chat/completions", **CHAT)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == expected


def test_prompts_come_as_text_or_ids_one_or_several(
    endpoint: Endpoint, reference: Reference
) -> None:
    texts = [CODE, "class Stack:\n    def "]
    ids = [reference.encode(one) for one in texts]
    expected = reference.texts(texts, 24)
    body = {**GREEDY, "prompt": ids[0]}
    assert text(endpoint.post("completions", **body)) == expected[0]
    for prompt in (texts, ids):
        answer = endpoint.post("completions", **{**GREEDY, "prompt": prompt}).json()
        assert [choice["text"] for choice in answer["choices"]] == expected
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_choices_have_seeds_of_their_own(endpoint: Endpoint, reference: Reference) -> None:
    body = {"prompt": CODE, "max_tokens": 12, "seed": 7, "n": 3}
    answer = endpoint.post("completions", **body).json()
    seeds = [derived_seed(7, index) for index in range(3)]
    expected = [reference.texts([CODE], 12, seed=s, temperature=1.0)[0] for s in seeds]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert len(set(expected)) == 3
    assert answer["usage"]["prompt_tokens"] == len(reference.encode(CODE))
    assert answer["usage"]["completion_tokens"] == 36
    streamed = ["", "", ""]
    for event in stream(endpoint, "completions", **body):
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == expected


def test_without_a_seed_two_answers_differ(endpoint: Endpoint) -> None:
    body = {"prompt": CODE, "max_tokens": 24}
    assert len({text(endpoint.post("completions", **body)) for _ in range(2)}) == 2


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_ends_the_text_before_the_first_word(
    endpoint: Endpoint, reference: Reference, streamed: bool
) -> None:
    long = reference.texts([CODE], 48)[0]
    words = ["never there", long[17:26], long[30:39]]
    for stop in (words, words[1]):
        expected = cut_at(long, [stop] if isinstance(stop, str) else stop)
        body = {**GREEDY, "max_tokens": 48, "stop": stop}
        if streamed:
            choices = [event["choices"][0] for event in stream(endpoint, "completions", **body)]
        else:
            choices = endpoint.post("completions", **body).json()["choices"]
        assert "".join(choice["text"] for choice in choices) == expected
        assert choices[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_end_token_is_a_stop_even_as_the_last_one_allowed(endpoint: Endpoint, path: str) -> None:
    body = {**(GREEDY if path == "completions" else CHAT), "max_tokens": 1}
    answer = endpoint.post(path, **body, logit_bias={"1": 100})
    assert text(answer) == ""
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    after = endpoint.post(path, **body, logit_bias={"1": 100}, ignore_eos=True)
    assert after.json()["choices"][0]["finish_reason"] == "length"


def test_lengths_that_are_not_given(endpoint: Endpoint) -> None:
    """16 tokens for a text, as OpenAI has it; for a message, what fits. An end token ends it."""
    answer = endpoint.post("completions", prompt=CODE, temperature=0, ignore_eos=True)
    assert answer.json()["usage"]["completion_tokens"] == 16
    chat = {"messages": TURNS, "logit_bias": {"1": 100}, "temperature": 0}
    answer = endpoint.post("chat/completions", **chat, min_tokens=40)
    assert answer.json()["usage"]["completion_tokens"] == 41


def test_logit_bias_forces_and_bans_token_ids(endpoint: Endpoint, reference: Reference) -> None:
    (token_id,) = reference.encode("(")
    body = {**GREEDY, "max_tokens": 3}
    assert text(endpoint.post("completions", **body, logit_bias={str(token_id): 100})) == "((("
    plain = reference.run([CODE], 1)[0].token_ids[-1]
    banned = endpoint.post("completions", **body, logit_bias={str(plain): -100})
    expected = reference.texts([CODE], 3, logit_bias=((plain, -100.0),))[0]
    assert text(banned) == expected != reference.texts([CODE], 3)[0]


@pytest.mark.parametrize(
    "sampling",
    [
        {"frequency_penalty": 1.5},
        {"presence_penalty": -1.0, "temperature": 0.8},
        {"repetition_penalty": 1.3, "top_k": 20, "temperature": 0.7},
        {"top_p": 0.9, "temperature": 1.2},
        {"min_p": 0.1, "temperature": 1.0, "min_tokens": 4},
    ],
    ids=str,
)
def test_sampling_parameters_reach_the_target(
    endpoint: Endpoint, reference: Reference, sampling: dict[str, Any]
) -> None:
    body = {"prompt": CODE, "max_tokens": 24, "seed": 5, "temperature": 0, **sampling}
    expected = reference.texts([CODE], 24, **{"seed": 5, **sampling})[0]
    assert text(endpoint.post("completions", **body)) == expected


def test_echo_puts_the_prompt_first(endpoint: Endpoint, reference: Reference) -> None:
    expected = CODE + reference.texts([CODE], 24)[0]
    assert text(endpoint.post("completions", **GREEDY, echo=True)) == expected
    by_ids = {**GREEDY, "prompt": reference.encode(CODE)}
    assert text(endpoint.post("completions", **by_ids, echo=True)) == expected
    events = stream(endpoint, "completions", **GREEDY, echo=True)
    assert "".join(event["choices"][0]["text"] for event in events) == expected


# -- what else comes with it -------------------------------------------------------------------


def test_logprobs_are_the_models_own_in_both_forms(
    endpoint: Endpoint, reference: Reference
) -> None:
    request = reference.run([CODE], 24, return_log_probs=True)[0]
    tokens = [reference.tokenizer.decode([one]) for one in request.token_ids[-24:]]
    whole = endpoint.post("completions", **GREEDY, logprobs=0).json()["choices"][0]["logprobs"]
    assert whole["tokens"] == tokens
    assert max(whole["token_logprobs"]) <= 0.0
    assert len(whole["token_logprobs"]) == 24
    starts = [sum(map(len, tokens[:i])) for i in range(24)]
    assert whole["text_offset"] == starts
    parts = [
        event["choices"][0]["logprobs"]
        for event in stream(endpoint, "completions", **GREEDY, logprobs=0)
    ]
    for name in ("tokens", "text_offset"):
        assert [one for part in parts for one in part[name]] == whole[name]
    chat = endpoint.post("chat/completions", **CHAT, logprobs=True).json()["choices"][0]
    content = chat["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == chat["message"]["content"]
    assert all(bytes(one["bytes"]).decode() == one["token"] for one in content)
    assert all(one["top_logprobs"] == [] for one in content)


def test_token_that_is_half_a_character_has_no_bytes(
    endpoint: Endpoint, reference: Reference
) -> None:
    half = reference.encode("\U0001f600")[0]
    body = {**CHAT, "max_tokens": 1, "logprobs": True, "logit_bias": {str(half): 100}}
    choice = endpoint.post("chat/completions", **body).json()["choices"][0]
    (one,) = choice["logprobs"]["content"]
    assert (one["token"], one["bytes"], choice["message"]["content"]) == ("\ufffd", None, "")


def test_usage_ends_a_stream_if_asked_for(endpoint: Endpoint, reference: Reference) -> None:
    for path, body, prompt in (
        ("completions", GREEDY, CODE),
        ("chat/completions", CHAT, CHAT_PROMPT),
    ):
        *events, last = stream(endpoint, path, **body, stream_options={"include_usage": True})
        assert last["choices"] == []
        num_input, num_output = len(reference.encode(prompt)), body["max_tokens"]
        assert last["usage"] == {
            "prompt_tokens": num_input,
            "completion_tokens": num_output,
            "total_tokens": num_input + num_output,
        }
        assert all(event["usage"] is None for event in events)
        assert not any("usage" in event for event in stream(endpoint, path, **body))


def test_speculation_is_told_if_asked_for(endpoint: Endpoint) -> None:
    body = {**GREEDY, "max_tokens": 48, "speculation": True}
    told = endpoint.post("completions", **body).json()["choices"][0]["speculation"]
    num_verified, num_accepted = told["verified_draft_tokens"], told["accepted_draft_tokens"]
    assert 0 <= num_accepted <= num_verified
    assert 0.0 <= told["queue_ms"] <= told["ttft_ms"]
    assert told["tpot_ms"] > 0.0
    last = stream(endpoint, "chat/completions", **CHAT, speculation=True)[-1]["choices"][0]
    assert set(last["speculation"]) == set(told)
    plain = endpoint.post("completions", **body, draft_source="none").json()["choices"][0]
    assert plain["speculation"]["verified_draft_tokens"] == 0
    assert "speculation" not in endpoint.post("completions", **GREEDY).json()["choices"][0]


@pytest.mark.parametrize("form", ["headers", "body"])
def test_late_request_of_a_class_that_wants_to_know_is_a_429(endpoint: Endpoint, form: str) -> None:
    slo = {"slo_ttft_ms": 0.001, "slo_tpot_ms": 50.0, "slo_class": "interactive"}
    headers = {f"x-{name.replace('_', '-')}": str(value) for name, value in slo.items()}
    asked = {"headers": headers} if form == "headers" else slo
    busy = {"model": MODEL, "stream": True, **GREEDY, "max_tokens": 2000}
    with client(endpoint.url) as http, http.stream("POST", "/v1/completions", json=busy) as first:
        lines = first.iter_lines()
        next(lines)  # an idle server lets everybody in
        answer = endpoint.post("completions", **GREEDY, **asked)
        check_error(answer, 429, None, "slo_ttft_ms 0.001", "try again in")
        assert int(answer.headers["retry-after"]) >= 1
        body = {"model": MODEL, "stream": True, **GREEDY, **slo}
        status = http.post("/v1/completions", json=body).status_code
        assert status == 429  # an error before the first event is a status


def test_objectives_that_can_be_kept_are_served(endpoint: Endpoint) -> None:
    headers = {"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "60000", "x-slo-class": "interactive"}
    same = {"slo_ttft_ms": 60000}
    assert endpoint.post("completions", **GREEDY, **same, headers=headers).status_code == 200


# -- what is refused ---------------------------------------------------------------------------

REFUSED = [
    ({"model": "other"}, 404, "model", ("'other'", "specserve")),
    ({"prompt": ""}, 400, "prompt", ("prompt is empty",)),
    ({"prompt": []}, 400, "prompt", ("at least 1",)),
    ({"prompt": [4096]}, 400, "prompt", ("4096", "[0, 4096)")),
    ({"prompt": "half \ud83d"}, 400, "prompt", ("surrogate",)),
    ({"max_tokens": 0}, 400, "max_tokens", ("0", "1")),
    ({"max_tokens": 5000}, 400, "prompt", ("5000", "limit of 4096", "shorten")),
    ({"temperature": 2.5}, 400, "temperature", ("2.5", "2")),
    ({"temperature": "hot"}, 400, "temperature", ("'hot'", "number")),
    ({"top_p": 0}, 400, "top_p", ("0",)),
    ({"n": 33}, 400, "n", ("33 choices", "limit is 32")),
    ({"n": 0}, 400, "n", ("0", "1")),
    ({"best_of": 2}, 400, "best_of", ("not supported", "n")),
    ({"suffix": "x"}, 400, "suffix", ("not supported",)),
    ({"logprobs": 5}, 400, "logprobs", ("5", "not supported", "0")),
    ({"logprobs": 0, "echo": True}, 400, "echo", ("logprobs", "not supported")),
    ({"logit_bias": {"4096": 1}}, 400, "logit_bias", ("4096", "[0, 4096)")),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias", ("'x'",)),
    ({"logit_bias": {"1": 101}}, 400, "logit_bias", ("101", "100")),
    ({"stop": ["x"] * 65}, 400, "stop", ("65", "limit is 64")),
    ({"stop": 5}, 400, "stop", ("5",)),
    ({"draft_source": "oracle"}, 400, "draft_source", ("oracle", "known are")),
    ({"slo_ttft_ms": 0}, 400, "slo_ttft_ms", ("0",)),
    ({"temprature": 1}, 400, "temprature", ("did you mean 'temperature'",)),
    ({"functions": []}, 400, "functions", ("not supported",)),
]  # fmt: skip
CHAT_REFUSED = [
    ({"messages": []}, "messages", ("at least 1",)),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", ("'tool'", "'user'")),
    ({"messages": [{"role": "user"}]}, "messages", ("content", "required")),
    ({"top_logprobs": 3}, "top_logprobs", ("3", "not supported")),
    ({"tools": [{"type": "function"}]}, "tools", ("not supported",)),
    ({"response_format": {"type": "json_object"}}, "response_format", ("not supported", "text")),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", ("one thing",)),
]


@pytest.mark.parametrize(("values", "status", "param", "words"), REFUSED, ids=str)
def test_bad_completion_is_refused_by_name(
    endpoint: Endpoint, values: dict[str, Any], status: int, param: str, words: tuple[str, ...]
) -> None:
    content = json.dumps({"model": MODEL, **GREEDY, **values})
    with client(endpoint.url) as http:
        headers = {"Content-Type": "application/json"}
        answer = http.post("/v1/completions", content=content, headers=headers)
    check_error(answer, status, param, *words)


@pytest.mark.parametrize(("values", "param", "words"), CHAT_REFUSED, ids=str)
def test_bad_chat_is_refused_by_name(
    endpoint: Endpoint, values: dict[str, Any], param: str, words: tuple[str, ...]
) -> None:
    check_error(endpoint.post("chat/completions", **{**CHAT, **values}), 400, param, *words)


@pytest.mark.parametrize(
    ("headers", "values", "words"),
    [
        ({"x-slo-ttft-ms": "soon"}, {}, ("x-slo-ttft-ms", "'soon'", "milliseconds")),
        ({"x-slo-tpot-ms": "nan"}, {}, ("slo_tpot_ms", "nan", "above 0")),
        ({"x-slo-tpot-ms": "5"}, {"slo_tpot_ms": 6}, ("x-slo-tpot-ms", "give one of them")),
    ],
    ids=str,
)
def test_bad_objective_in_a_header_is_refused(
    endpoint: Endpoint, headers: dict[str, str], values: dict[str, Any], words: tuple[str, ...]
) -> None:
    answer = endpoint.post("completions", **GREEDY, **values, headers=headers)
    assert answer.status_code == 400
    assert all(word in answer.json()["error"]["message"] for word in words)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"nope", b"\xff", b'{"model": ' + b"[" * 100_000, b"1" * 5000, b"null"],
    ids=lambda content: str(content[:12]),
)
def test_body_that_is_no_json_object_is_a_400(endpoint: Endpoint, content: bytes) -> None:
    with client(endpoint.url) as http:
        headers = {"Content-Type": "application/json"}
        answer = http.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_unknown_paths_and_methods_are_told_in_the_same_shape(endpoint: Endpoint) -> None:
    with client(endpoint.url) as http:
        check_error(http.get("/v1/nothing"), 404, None)
        check_error(http.get("/v1/completions"), 405, None)
        check_error(http.get("/v1/models/other"), 404, "model", "'other'")


def test_models_and_health(endpoint: Endpoint) -> None:
    with client(endpoint.url) as http:
        (model,) = http.get("/v1/models").json()["data"]
        assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", 4096)
        assert http.get(f"/v1/models/{MODEL}").json() == model
        assert http.get("/health").json() == {"status": "ok"}


# -- clients who leave, servers that do --------------------------------------------------------


def test_client_that_disconnects_frees_its_request(endpoint: Endpoint) -> None:
    """Streamed, whole, before and after the first token; and those who stay are served."""
    before = endpoint.server.metrics()["specserve_output_tokens_total"]
    with ThreadPoolExecutor(16) as pool:
        side = pool.submit(endpoint.post, "completions", **GREEDY)
        for _ in pool.map(lambda i: leave_early(endpoint, i), range(48)):
            pass
        assert side.result().status_code == 200
    wait_until_idle(endpoint.server)
    spent = endpoint.server.metrics()["specserve_output_tokens_total"] - before
    assert spent < 48 * 2 * 3500 / 4, "requests ran on without their clients"
    assert endpoint.server.process.poll() is None


def leave_early(endpoint: Endpoint, kind: int) -> None:
    """Ask for a long text and close the connection: at once, soon, or after some events."""
    body = {"model": MODEL, **GREEDY, "max_tokens": 3500, "ignore_eos": True, "n": 2}
    body["stream"] = kind % 3 > 0
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
        if kind % 3 == 2:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        else:
            time.sleep(0.02 * (kind % 5))


def test_sigterm_lets_a_stream_finish(endpoint: Endpoint, reference: Reference) -> None:
    expected = reference.texts([CODE], 200, end_id=None)[0]
    body = {"model": MODEL, **GREEDY, "max_tokens": 200, "stream": True, "ignore_eos": True}
    server = endpoint.server
    with (
        running(server.grpc_port, server.metrics_port) as (url, process),
        client(url) as http,
        http.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        events = [next(lines)]
        process.send_signal(signal.SIGTERM)
        events += [line for line in lines if line]
        assert events.pop() == "data: [DONE]"
        told = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in events]
        assert "".join(told) == expected
        assert process.wait(30) in (0, -signal.SIGTERM)


def test_server_that_dies_ends_streams_with_an_error_and_new_calls_with_503(
    demo_engines: Path,
) -> None:
    body = {"model": MODEL, **GREEDY, "max_tokens": 3500, "stream": True, "ignore_eos": True}
    overrides = [f"engine.dir={demo_engines}", "engine.precision=f32"]
    with (
        serving(overrides) as server,
        running(server.grpc_port, server.metrics_port) as (url, _),
        client(url) as http,
    ):
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert "text" in next(lines)
            for pid in server.process.pids():
                os.kill(pid, signal.SIGKILL)
            *_, last = (line for line in lines if line)
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        check_unavailable(http)


def check_unavailable(http: httpx.Client) -> None:
    """Assert that everything that needs the server is a 503 with a time to come back."""
    calls = [
        http.get("/health"),
        http.post("/v1/completions", json={"model": MODEL, **GREEDY}),
        http.post("/v1/chat/completions", json={"model": MODEL, **CHAT, "stream": True}),
    ]
    for answer in calls:
        check_error(answer, 503, None, "try again")
        assert answer.headers["retry-after"] == "1"


# -- who may come in, and with how much --------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An endpoint that asks for a key, takes 1000 bytes, and has no server behind it."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("first key\n\nsecond\n", encoding="utf-8")
    overrides = [f"openai.api_key_file={keys}", "openai.max_body_bytes=1000"]
    with running(1, 1, overrides) as (url, _):
        yield url


@pytest.mark.parametrize("given", [None, "Bearer third", "Basic second", "Bearer", "Bearer \xe9"])
def test_without_a_key_nothing_is_answered(guarded: str, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    with client(guarded, headers=headers) as http:
        for path in ("/v1/models", "/live/data", "/openapi.json", "/nothing"):
            check_error(http.get(path), 401, None, "Authorization: Bearer")
        answer = http.post("/v1/completions", json={"model": MODEL, **GREEDY})
        check_error(answer, 401, None, "Authorization: Bearer")
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["first key", "second"])
def test_each_key_lets_in(guarded: str, key: str) -> None:
    with client(guarded, headers={"Authorization": f"Bearer {key}"}) as http:
        assert http.get("/v1/models").status_code == 200
        answer = http.post("/v1/completions", json={"model": MODEL, **GREEDY})
        check_error(answer, 503, None, "try again")


def test_page_and_health_need_no_key(guarded: str) -> None:
    with client(guarded) as http:
        assert http.get("/").status_code == 200
        assert http.get("/live.js").status_code == 200
        check_error(http.get("/health"), 503, None, "not ready")


@pytest.mark.parametrize("is_declared", [True, False])
def test_body_over_the_limit_is_a_413(guarded: str, is_declared: bool) -> None:
    content = json.dumps({"model": MODEL, **GREEDY, "prompt": "x" * 2000}).encode()
    headers = {"Authorization": "Bearer second", "Content-Type": "application/json"}
    with client(guarded, headers=headers) as http:
        body = content if is_declared else iter([content[:600], content[600:]])
        answer = http.post("/v1/completions", content=body)
    check_error(answer, 413, None, "1000")


def test_tls_with_a_certificate_of_ours(endpoint: Endpoint, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=x"
    where = [
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    subprocess.run([*make.split(), *where], check=True, capture_output=True)
    overrides = [f"openai.tls_cert_file={certificate}", f"openai.tls_key_file={key}"]
    server = endpoint.server
    with (
        running(server.grpc_port, server.metrics_port, overrides) as (url, _),
        client(url, verify=ssl.create_default_context(cafile=certificate)) as http,
    ):
        assert http.get("/health").json() == {"status": "ok"}
        assert http.post("/v1/completions", json={"model": MODEL, **GREEDY}).status_code == 200
