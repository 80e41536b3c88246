"""PyTorch on a CPU or a CUDA GPU: Hugging Face checkpoints as they are, with paged KV.

The reference that other engines are compared with, and the engine of GPUs without TensorRT-LLM.
"""

from pathlib import Path

import torch

from specserve.config import Config
from specserve.engines import describe
from specserve.engines.model_target import ModelTargetEngine
from specserve.engines.torch.draft import TorchDraftEngine
from specserve.engines.torch.model import TorchModel
from specserve.engines.torch.sampler import DeviceSampler
from specserve.predictor.measure import DRAFT_LENGTHS, DRAFT_ROWS

PRECISIONS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DEVICES = ("cpu", "cuda")


def make_draft(config: Config) -> TorchDraftEngine:
    """Load `draft/` of the pair."""
    longest = max(config.policy.max_draft_tokens, *DRAFT_LENGTHS)  # what the profile drafts too
    return TorchDraftEngine(_load(config, "draft"), longest, _max_rows(config))


def make_target(config: Config) -> ModelTargetEngine:
    """Load `target/` of the pair."""
    model = _load(config, "target")
    return ModelTargetEngine(model, DeviceSampler(model))


def _load(config: Config, role: str) -> TorchModel:
    info, engine = describe(config), config.engine
    folder = Path(engine.dir) / role
    _check(config)
    if engine.num_threads:
        torch.set_num_threads(engine.num_threads)
    return TorchModel(
        folder,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        max_seq_len=info.max_seq_len,
        max_tokens=config.scheduler.max_num_batched_tokens,
        device=engine.device,
        dtype=PRECISIONS[engine.precision],
        sizes=info.captured_sizes,
        compiler="inductor" if engine.compile and engine.device == "cuda" else "",
    )


def _max_rows(config: Config) -> int:
    return max(config.scheduler.max_num_seqs, *DRAFT_ROWS)


def _check(config: Config) -> None:
    """Refuse what cannot work here.

    Raises:
        ValueError: naming the value, the limit and the fix.
    """
    engine = config.engine
    if engine.precision not in PRECISIONS:
        raise ValueError(
            f"engine.precision is '{engine.precision}': torch supports {', '.join(PRECISIONS)}"
        )
    if engine.device not in DEVICES:
        raise ValueError(f"engine.device is '{engine.device}': known are {', '.join(DEVICES)}")
    limit, most = config.scheduler.max_num_batched_tokens, _max_rows(config)
    if limit < most:
        raise ValueError(
            f"scheduler.max_num_batched_tokens is {limit}: torch needs {most}, one for each row of "
            f"scheduler.max_num_seqs and at least {max(DRAFT_ROWS)}"
        )
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("engine.device is 'cuda', and PyTorch finds no CUDA GPU: set cpu")
