"""Inputs that no sane client sends: tensors, JSON, protobuf and HTTP, as hypothesis strategies.

Every input is short to serve if it happens to be valid: length is not what is tried. None is of the
kind that server 2.51 is known to fall over, which SECURITY.md names: megabytes of tiny chunks.
"""

import functools
import json
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from python_backend.tensors import INPUTS, INTERNAL_INPUTS, TensorSpec

MODELS = ("ensemble", "tensorrt_llm_bls", "specserve")
SPECS = {spec.name: spec for spec in (*INPUTS, *INTERNAL_INPUTS)}
_PACK = {
    "INT32": "i", "INT64": "q", "UINT64": "Q", "UINT8": "B", "FP16": "e", "FP32": "f", "BOOL": "?",
}  # fmt: skip
_INTEGERS = {"INT32": (-(2**31), 2**31 - 1), "INT64": (-(2**63), 2**63 - 1)}
_INTEGERS |= {"UINT64": (0, 2**64 - 1), "UINT8": (0, 255)}
_DATATYPES = ("BYTES", *_PACK, "BF16", "INT8", "FP64", "", "NONSENSE")
_LENGTHS = (-(2**31), -1, 0, 1, 2, 3, 4096, 2**31 - 1)  # none that takes long
_HUGE = (-1, 0, 2, 2**31, 2**40, 2**62)


class Tensor(NamedTuple):
    """One tensor as it goes over the wire."""

    name: str
    datatype: str
    shape: Sequence[int]
    raw: bytes


@functools.cache
def values_of(spec: TensorSpec) -> st.SearchStrategy[Any]:
    """Return values of a tensor's own type, with a liking for the edges."""
    if spec.name == "max_tokens":
        return st.sampled_from(_LENGTHS)
    if spec.dtype == "STRING":
        return st.one_of(st.binary(max_size=40), st.text(max_size=40).map(_encoded))
    if spec.dtype == "BOOL":
        return st.booleans()
    if spec.dtype in _INTEGERS:
        low, high = _INTEGERS[spec.dtype]
        return st.one_of(st.integers(max(low, -4), 4), st.integers(low, high))
    width = 16 if spec.dtype == "FP16" else 32
    return st.one_of(st.floats(0.0, 2.0, width=width), st.floats(width=width))


@st.composite
def tensors(draw: Callable[..., Any], name: str) -> Tensor:
    """Return a tensor of a name: mostly of its own type and shape, else of any."""
    spec = SPECS[name]
    datatype = "BYTES" if spec.dtype == "STRING" else spec.dtype
    dims = [draw(st.integers(0, 3)) if dim == -1 else dim for dim in spec.dims]
    shape, count = [1, *dims], 1
    for dim in dims:
        count *= dim
    values = draw(st.lists(values_of(spec), min_size=count, max_size=count))
    raw = _packed(spec, values)
    match draw(st.integers(0, 11)):
        case 0:
            datatype = draw(st.sampled_from(_DATATYPES))
        case 1:
            shape = draw(st.lists(st.integers(0, 3), max_size=4))
        case 2:
            shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from(_HUGE))
        case 3:
            raw = draw(mutated(raw))
    return Tensor(name, datatype, shape, raw)


@st.composite
def requests(draw: Callable[..., Any]) -> service_pb2.ModelInferRequest:
    """Return a request with some of our tensors, most of the time a prompt and a length too."""
    request = service_pb2.ModelInferRequest(model_name=draw(st.sampled_from(MODELS)))
    names = set(draw(st.lists(st.sampled_from(sorted(SPECS)), max_size=4)))
    chosen = [draw(tensors(name)) for name in sorted(names)]
    if draw(st.integers(0, 9)):
        base = {"text_input": [b"x"], "max_tokens": [2]}
        chosen += [
            Tensor(
                name, "BYTES" if name == "text_input" else "INT32", [1, 1], _packed(SPECS[name], v)
            )
            for name, v in base.items()
            if name not in names
        ]
    for tensor in chosen:
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        request.raw_input_contents.append(tensor.raw)
    return request


_JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.floats(), st.text(max_size=20)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def json_bodies(draw: Callable[..., Any]) -> bytes:
    """Return a body of `generate`: our names with any JSON, sometimes broken as text."""
    names = draw(st.lists(st.sampled_from([*sorted(SPECS), "id", "timeout"]), max_size=4))
    body: dict[str, Any] = {"text_input": "x", "max_tokens": 2}
    for name in names:
        lengths = st.sampled_from([*_LENGTHS, 2.5, "3", None, [1], 2**40])
        body[name] = draw(lengths if name == "max_tokens" else _JSON)
    if draw(st.integers(0, 9)) == 0:
        body[draw(st.text(max_size=12))] = draw(_JSON)
    text = json.dumps(body).encode()
    return draw(mutated(text)) if draw(st.integers(0, 3)) == 0 else text


@st.composite
def mutated(draw: Callable[..., Any], whole: bytes) -> bytes:
    """Return some bytes with a few of them changed, cut, doubled or put in."""
    found = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(found)))
        match draw(st.integers(0, 4)):
            case 0:
                found[at:at] = draw(st.binary(min_size=1, max_size=8))
            case 1:
                del found[at : at + draw(st.integers(1, 8))]
            case 2:
                del found[at:]
            case 3:
                found[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case _:
                found[at:at] = found[max(0, at - 16) : at]
    return bytes(found)


@st.composite
def protobufs(draw: Callable[..., Any]) -> bytes:
    """Return the bytes of a request that no longer is one, or any bytes at all."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.binary(max_size=64))
    return draw(mutated(draw(requests()).SerializeToString()))


def http_messages(path: str, body: bytes) -> st.SearchStrategy[bytes]:
    """Return what comes over a connection in place of a good POST of `body` to `path`."""
    length = f"Content-Length: {len(body)}\r\n"
    heads = [
        length,
        "",
        "Content-Length: -1\r\n",
        "Content-Length: 99999999999999999999\r\n",
        "Content-Length: nine\r\n",
        f"{length}Content-Length: 3\r\n",
        f"{length}Transfer-Encoding: chunked\r\n",
        f"{length}Inference-Header-Content-Length: 1000\r\n",
        f"{length}Inference-Header-Content-Length: -1\r\n",
        f"{length}Content-Encoding: gzip\r\n",
        f"{length}Expect: 100-continue\r\n",
    ]
    messages = [
        f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}\r\n".encode() + body
        for head in heads
    ]
    good = st.sampled_from(messages)
    return st.one_of(good, good.flatmap(mutated), st.binary(max_size=200))


def _packed(spec: TensorSpec, values: Sequence[Any]) -> bytes:
    if spec.dtype == "STRING":
        return b"".join(struct.pack("<I", len(one)) + one for one in values)
    return b"".join(struct.pack(f"<{_PACK[spec.dtype]}", one) for one in values)


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
