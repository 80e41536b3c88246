"""Example requests against the `ensemble` model, as text to paste into a shell."""

import sys

_PROMPT = r"import unittest\n\nclass Test"

_CURL = """\
curl -N http://{host}:{http_port}/v2/models/ensemble/generate_stream \\
  -d '{{"text_input": "{prompt}", "max_tokens": 40, "stream": true}}'
"""

_OPENAI = """\
curl -N{insecure} {scheme}://{host}:{port}/v1/completions -H 'Content-Type: application/json' \\
  {key}-d '{{"model": "{model}", "prompt": "{prompt}", "max_tokens": 40, "stream": true}}'

Live view in a browser: {scheme}://{host}:{port}/
"""

_PYTHON = """\
{python} - <<'EOF'
import queue
import numpy as np
import tritonclient.grpc as triton

tensors = [
    ("text_input", "BYTES", np.array([["{prompt}"]], dtype=object)),
    ("max_tokens", "INT32", np.array([[40]], dtype=np.int32)),
    ("stream", "BOOL", np.array([[True]])),
]
inputs = [triton.InferInput(name, data.shape, kind) for name, kind, data in tensors]
for tensor, (_, _, data) in zip(inputs, tensors):
    tensor.set_data_from_numpy(data)

answers = queue.Queue()
with triton.InferenceServerClient("{host}:{grpc_port}") as client:
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer("ensemble", inputs, enable_empty_final_response=True)
    final = False
    while not final:
        result, error = answers.get()
        if error:
            raise SystemExit(error)
        text = result.as_numpy("text_output")
        if text is not None:
            print(b"".join(text.ravel()).decode(), end="", flush=True)
        final = result.get_response().parameters["triton_final_response"].bool_param
print()
EOF
"""


def client_host(address: str) -> str:
    """Return where a client on this machine reaches a server bound to `address`."""
    return "127.0.0.1" if address == "0.0.0.0" else address


def example_calls(address: str, http_port: int, grpc_port: int) -> str:
    """Write a streaming call with curl and one with tritonclient, each ready to paste."""
    values = {
        "host": client_host(address),
        "http_port": http_port,
        "grpc_port": grpc_port,
        "prompt": _PROMPT,
        "python": sys.executable,
    }
    return f"{_CURL.format(**values)}\n{_PYTHON.format(**values)}"


def openai_call(address: str, port: int, model: str, *, has_tls: bool, has_keys: bool) -> str:
    """Write a streaming call of the OpenAI endpoint with curl, and where its page is."""
    return _OPENAI.format(
        scheme="https" if has_tls else "http",
        insecure=" --insecure" if has_tls else "",
        host=client_host(address),
        port=port,
        key='-H "Authorization: Bearer $OPENAI_API_KEY" ' if has_keys else "",
        model=model,
        prompt=_PROMPT,
    )
