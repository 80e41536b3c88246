"""How near does plain decoding of one request come to what the memory bandwidth allows?

Method: a token cannot take less time than reading the weights and the KV cache once. The bandwidth
is measured too, the best of some ways of reading a large buffer on the same device. The request
decodes on the step loop that serves, with policy `none`; prompt and first tokens are not counted.
The target of the GPU benchmark pair is the demo target inflated to 7 B parameters
(`python -m build_engines gpu-pair`): the cost of its shape, the text of the small one.

Example: python -m bench.decode --device cuda --compile --engines build/gpu_pair
         python -m bench.decode --engines build_engines/demo_pair --precision f32
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu import describe_gpu
from bench.prompts import held_out_prompts
from bench.record import ROOT, emit, made_of
from specserve import manifest
from specserve.assemble import assemble
from specserve.config import Config, load_config
from specserve.engines.torch import PRECISIONS
from specserve.manifest import Manifest
from specserve.request import Request
from specserve.telemetry import make_telemetry
from specserve.text import load_tokenizer

PROMPT_TOKENS = 96
UNCOUNTED_TOKENS = 16


def main() -> None:
    """Measure both, print one JSON line."""
    options = _parse()
    config = load_config(
        None,
        [
            "engine.name=torch", f"engine.dir={options.engines}", "policy.name=none",
            f"engine.device={options.device}", f"engine.precision={options.precision}",
            f"engine.compile={str(options.compile).lower()}",
            f"engine.num_threads={options.threads}",
        ],
    )  # fmt: skip
    telemetry = make_telemetry(config)
    seconds, context_tokens = _decode(config, options.tokens)
    token_s = float(np.median(seconds))
    num_bytes = _bytes_of_token(config, context_tokens)
    bandwidth = _bandwidth(torch.device(options.device), options.buffer_gb)
    limit = bandwidth / num_bytes
    print(
        f"{1 / token_s:.1f} tokens/s of {limit:.1f}: {1 / token_s / limit:.0%} of the limit of "
        f"{num_bytes / 1e9:.2f} GB a token at {bandwidth / 1e9:.0f} GB/s"
    )
    emit(
        {
            "bench": "decode",
            "pair": made_of(options.engines),
            "gpu": describe_gpu(telemetry),
            "tokens_per_s": 1 / token_s,
            "share_of_limit": 1 / token_s / limit,
            "token_ms": {f"p{p}": float(1e3 * np.percentile(seconds, p)) for p in (50, 99)},
            "bytes_per_token": num_bytes,
            "bandwidth_bytes_per_s": bandwidth,
            "context_tokens": context_tokens,
            "config": vars(options),
        },
        options.output,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", default=str(ROOT / "build" / "gpu_pair"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; 0 takes all")
    parser.add_argument("--tokens", type=int, default=256, help="to decode and count")
    parser.add_argument("--buffer-gb", type=float, default=4.0, help="to measure bandwidth with")
    parser.add_argument("--output", type=Path, help="append the JSON line to this file")
    return parser.parse_args()


def _decode(config: Config, num_tokens: int) -> tuple[list[float], float]:
    """Return the seconds of each counted step, and the mean context."""
    core = assemble(config)
    tokenizer = load_tokenizer(Path(config.engine.dir) / "target")
    [prompt] = held_out_prompts(tokenizer, 1, PROMPT_TOKENS)
    core.scheduler.submit(Request(prompt, UNCOUNTED_TOKENS + num_tokens))
    seconds = []
    while core.scheduler.has_work:
        started = time.perf_counter()
        core.step()
        seconds.append(time.perf_counter() - started)
    return seconds[-num_tokens:], PROMPT_TOKENS + UNCOUNTED_TOKENS + num_tokens / 2


def _bytes_of_token(config: Config, context_tokens: float) -> float:
    """Count what a token reads: weights, without an input embedding of their own, and KV."""
    folder = Path(config.engine.dir) / "target"
    target: Manifest = manifest.load(folder)
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    num_weights = target.num_parameters
    if not tree.get("tie_word_embeddings"):
        num_weights -= target.vocab_size * target.hidden_size
    kv = 2 * target.num_layers * target.num_kv_heads * target.head_dim * context_tokens
    return (num_weights + kv) * PRECISIONS[config.engine.precision].itemsize


def _bandwidth(device: torch.device, num_gb: float) -> float:
    """Return the best bytes per second of reading a buffer."""
    num_rows = int(num_gb * 1e9 / 2 / 4096)
    buffer = torch.ones((num_rows, 4096), dtype=torch.bfloat16, device=device)
    vector = torch.ones(4096, dtype=torch.bfloat16, device=device)
    floats = buffer.view(torch.float32)
    ways: list[Callable[[], Any]] = [lambda: buffer @ vector, floats.sum, floats.amax]
    return max(buffer.nbytes / _seconds(way, device) for way in ways)


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Time some work on a device: the best of a few runs."""
    best = float("inf")
    for _ in range(repeats):
        _finish(device)
        started = time.perf_counter()
        work()
        _finish(device)
        best = min(best, time.perf_counter() - started)
    return best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
