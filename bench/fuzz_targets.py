"""Where bad input goes in, and what is no good answer to it."""

import contextlib
import http.client
import json
import re
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc

from bench.fuzz_inputs import MODELS, http_messages, json_bodies, mutated, protobufs, requests

TIMEOUT_S = 60.0
SILENT_S = 1.0  # after the client has said all, over a bare connection
MAX_EXAMPLES = 20
INTERNAL = re.compile(
    r"Traceback|\.py\b|(?<![\w/])/(?:\w+/)+\w|specserve-[0-9a-f]{6}|/dev/shm|object at|Errno"
)
# Answers of server 2.51's own front ends, before any of our code: clients' faults that it takes for
# its own, and one that hides what is closed.
FRONT_END = re.compile(
    r"failed to parse the request JSON buffer|Unable to parse|HTTP end point doesn't support models"
    r"|This protocol is restricted|attempt to get members for non-object"
    r"|parameter key '.*' was not found in the JSON"
)
_COMPLETION = {"model": "specserve", "prompt": "x", "max_tokens": 2}
_SERVICE = "/inference.GRPCInferenceService"
_METHODS = ("ModelInfer", "ModelMetadata", "ModelReady", "SystemSharedMemoryRegister", "Nothing")


@dataclass(slots=True)
class Findings:
    """What came back.

    Attributes:
        answers: how often each kind of input got each answer.
        examples: inputs with answers that are none: faults of the server, silence, internals.
    """

    answers: dict[str, Counter[str]] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    num_bad: int = 0

    def add(self, kind: str, sent: Any, answer: str, text: str = "", *, is_bad: bool) -> None:
        """Note one answer; it is also bad if its text tells something internal."""
        if is_bad and FRONT_END.search(text):
            is_bad, answer = False, f"{answer} by Triton's front end"
        self.answers.setdefault(kind, Counter())[answer] += 1
        if is_bad or INTERNAL.search(text):
            self.num_bad += 1
            if len(self.examples) < MAX_EXAMPLES:
                self.examples.append(f"{kind}: {answer} {text[:300]!r} to {str(sent)[:500]!r}")


@dataclass(frozen=True, slots=True)
class Target:
    """A server on this machine, and what was found; each method sends one input."""

    http_port: int
    openai_port: int
    channel: grpc.Channel
    findings: Findings = field(default_factory=Findings)

    def tensors(self, request: service_pb2.ModelInferRequest) -> None:
        """Send tensors over a gRPC stream, which is read to its end."""
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        request.parameters["coded_errors"].bool_param = True
        text = ""
        try:
            for message in stub.ModelStreamInfer(iter([request]), timeout=TIMEOUT_S):
                text = message.error_message or text
        except grpc.RpcError as error:
            self._add_status("tensors", request, error)
            return
        code, is_coded, _ = text.partition(": ")
        answer = "fine" if not text else code if is_coded and code.isupper() else "refused"
        self.findings.add("tensors", request, answer, text, is_bad=code in ("INTERNAL", "UNKNOWN"))

    def protobuf(self, content: bytes, method: str) -> None:
        """Send bytes in place of a message."""
        make = (
            self.channel.stream_stream if method == "ModelStreamInfer" else self.channel.unary_unary
        )
        call = make(f"{_SERVICE}/{method}", lambda one: one, lambda one: one)
        try:
            if method == "ModelStreamInfer":
                list(call(iter([content]), timeout=TIMEOUT_S))
            else:
                call(content, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            self._add_status("protobuf", content, error)
        else:
            self.findings.add("protobuf", content, "fine", is_bad=False)

    def json(self, content: bytes, path: str) -> None:
        """POST bytes in place of a JSON body."""
        port = self.openai_port if path.startswith("/v1") else self.http_port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        kind = "openai json" if path.startswith("/v1") else "json"
        with contextlib.closing(connection):
            try:
                connection.request("POST", path, content, {"Content-Type": "application/json"})
                response = connection.getresponse()
                text = response.read().decode(errors="replace")
            except (OSError, http.client.HTTPException) as error:
                self.findings.add(kind, content, type(error).__name__, str(error), is_bad=True)
                return
        # NOTE: an answer of `generate` may repeat the prompt, which may look like anything.
        told = "" if response.status == 200 else text
        self.findings.add(kind, content, str(response.status), told, is_bad=response.status >= 500)

    def connection(self, content: bytes, port: int) -> None:
        """Write bytes to a connection, say that there are no more, read what comes."""
        kind = "openai http" if port == self.openai_port else "http"
        found = b""
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as one:
            one.settimeout(SILENT_S)
            with contextlib.suppress(OSError):  # it may hang up before it has heard all
                one.sendall(content)
                one.shutdown(socket.SHUT_WR)
                while part := one.recv(65536):
                    found += part
        status = found[9:12].decode(errors="replace") if found.startswith(b"HTTP/1.") else ""
        told = "" if status == "200" else found.decode(errors="replace")
        self.findings.add(kind, content, status or "no answer", told, is_bad=status[:1] == "5")

    def _add_status(self, kind: str, sent: Any, error: Any) -> None:
        code, text = error.code(), error.details() or ""
        is_bad = code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
        self.findings.add(kind, sent, code.name, text, is_bad=is_bad)


def ways(target: Target) -> Sequence[Callable[[int], None]]:
    """Return a function for each way in; it sends about so many inputs, the same ones always."""
    triton = [f"/v2/models/{m}/{e}" for m in MODELS for e in ("generate", "generate_stream")]
    triton.append("/v2/models/ensemble/infer")
    openai = ["/v1/completions", "/v1/chat/completions", "/v1/models"]
    good = {"/v2/models/ensemble/generate": b'{"text_input": "x", "max_tokens": 2}'}
    good["/v1/completions"] = json.dumps(_COMPLETION).encode()
    connections = st.sampled_from(sorted(good.items())).flatmap(
        lambda one: st.tuples(
            http_messages(*one),
            st.just(target.openai_port if one[0].startswith("/v1") else target.http_port),
        )
    )
    methods = st.sampled_from(["ModelStreamInfer", *_METHODS])
    broken = mutated(good["/v1/completions"])
    return [
        _sender(target.tensors, st.tuples(requests())),
        _sender(target.json, st.tuples(json_bodies(), st.sampled_from(triton))),
        _sender(target.json, st.tuples(broken, st.sampled_from(openai))),
        _sender(target.protobuf, st.tuples(protobufs(), methods)),
        _sender(target.connection, connections),
    ]


def _sender(send: Callable[..., None], inputs: Any) -> Callable[[int], None]:
    def run(num_inputs: int) -> None:
        @settings(
            max_examples=num_inputs,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs)
        def one(values: tuple[Any, ...]) -> None:
            send(*values)

        one()

    return run
