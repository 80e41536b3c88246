"""Estimates of step times from datasheets: a roofline for each device and pair, nothing measured.

    python -m specserve.profiles.estimate        writes the files beside this one again

One pass over n tokens with c tokens of context, weights spread over `tp` GPUs (tensor parallel):

    memory    = (weights + kv c) / (tp bandwidth MEMORY_SHARE)
    compute   = 2 parameters n / (tp peak COMPUTE_SHARE)
    exchange  = 2 layers (ALL_REDUCE_S + 2 (tp - 1) / tp hidden n 2 bytes / link), 0 for tp = 1
    T(n, c)   = layers LAYER_S + PASS_S + knee(memory, compute) + exchange

The draft runs on one of the GPUs. The shares and the seconds below are assumptions, chosen to be
what good kernels reach; check them against a measurement before money depends on them.
"""

from dataclasses import dataclass

import numpy as np

from specserve.predictor.profile import DraftSample, Profile, VerifySample
from specserve.predictor.roofline import Roofline
from specserve.profiles import ESTIMATE, FOLDER

BYTES = 2  # bf16 weights and KV
MEMORY_SHARE = 0.75  # of the datasheet's bandwidth
COMPUTE_SHARE = 0.6  # of the datasheet's dense bf16 peak
LAYER_S = 6e-6  # kernel launches of a layer, captured in a graph
PASS_S = 300e-6  # sampling, and the engine's own work for a pass
ALL_REDUCE_S = 10e-6
LINK_SHARE = 0.8
KNEE = 8.0
USABLE_MEMORY = 0.9
WEIGHTS_SHARE = 0.75  # of that, at most; the rest holds KV
TENSOR_PARALLEL = (1, 2, 4, 8)

VERIFY_SIZES = (1, 16, 64, 128, 192, 256, 384, 512, 1024, 2048)
CONTEXTS = (0.01, 0.1, 0.5)  # tokens of all rows, as a share of the KV cache
DRAFT_ROWS = (1, 16, 256)
DRAFT_LENGTHS = (1, 8)
DRAFT_CONTEXT = 500  # of a row
CATCH_UP = 1024
LIMITS = {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "prefill_chunk_tokens": 1024}


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU's datasheet.

    Attributes:
        bandwidth: of its memory, bytes per second.
        peak: dense bf16 FLOPs per second.
        link: to other GPUs, bytes per second in one direction.
    """

    name: str
    memory_bytes: float
    bandwidth: float
    peak: float
    link: float
    datasheet: str


@dataclass(frozen=True, slots=True)
class Model:
    """A model's shape, from the `config.json` of its checkpoint."""

    name: str
    num_parameters: float
    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int

    @property
    def weights_bytes(self) -> float:
        """Weights of the whole model."""
        return self.num_parameters * BYTES

    @property
    def kv_bytes(self) -> float:
        """Keys and values of one token."""
        return 2.0 * self.num_layers * self.num_kv_heads * self.head_dim * BYTES


# Dense rates; the datasheets print twice as much "with sparsity". NVLink is printed both ways.
DEVICES = {
    "a100": Device("NVIDIA A100 SXM 80GB", 80e9, 2.039e12, 312e12, 300e9,
                   "NVIDIA A100 Tensor Core GPU datasheet (2021)"),
    "h100": Device("NVIDIA H100 SXM 80GB", 80e9, 3.35e12, 989e12, 450e9,
                   "NVIDIA H100 Tensor Core GPU datasheet (2023)"),
    "h200": Device("NVIDIA H200 SXM 141GB", 141e9, 4.8e12, 989e12, 450e9,
                   "NVIDIA H200 Tensor Core GPU datasheet (2024)"),
    "l40s": Device("NVIDIA L40S 48GB", 48e9, 864e9, 362e12, 32e9,
                   "NVIDIA L40S GPU datasheet (2023)"),
}  # fmt: skip

LLAMA_160M = Model("JackFram/llama-160m", 0.162e9, 12, 768, 12, 64, 2048)
LLAMA_1B = Model("Llama-3.2-1B", 1.236e9, 16, 2048, 8, 64, 131072)
PAIRS = {
    "llama-7b": (Model("Llama-2-7b", 6.74e9, 32, 4096, 32, 128, 4096), LLAMA_160M),
    "llama-13b": (Model("Llama-2-13b", 13.02e9, 40, 5120, 40, 128, 4096), LLAMA_160M),
    "llama-70b": (Model("Llama-3.1-70B", 70.6e9, 80, 8192, 8, 128, 131072), LLAMA_1B),
}
MAX_SEQ_LEN = 8192


@dataclass(frozen=True, slots=True)
class PassTime:
    """Seconds of one pass of a model over `tp` GPUs; the formula above."""

    device: Device
    model: Model
    tp: int = 1

    def __call__(self, num_tokens: int, context_tokens: int) -> float:
        """Return T(n, c)."""
        bandwidth = self.tp * self.device.bandwidth * MEMORY_SHARE
        roofline = Roofline(
            overhead=self.model.num_layers * LAYER_S + PASS_S,
            weights=self.model.weights_bytes / bandwidth,
            kv=self.model.kv_bytes / bandwidth,
            flops=2.0 * self.model.num_parameters / (self.tp * self.device.peak * COMPUTE_SHARE),
            knee=KNEE,
        )
        tokens = np.array([float(num_tokens)])
        return float(roofline(tokens, float(context_tokens))[0]) + self._exchange_s(num_tokens)

    def _exchange_s(self, num_tokens: int) -> float:
        if self.tp == 1:
            return 0.0
        sent = 2.0 * (self.tp - 1) / self.tp * self.model.hidden_size * num_tokens * BYTES
        all_reduce_s = ALL_REDUCE_S + sent / (self.device.link * LINK_SHARE)
        return 2.0 * self.model.num_layers * all_reduce_s


def estimate(device: Device, target: Model, draft: Model) -> Profile:
    """Return the profile of a pair on as few of these GPUs as leave room for KV."""
    tp = _num_gpus(device, target, draft)
    kv_cache_tokens = _kv_cache_tokens(device, target, draft, tp)
    limits = LIMITS | {
        "kv_cache_tokens": kv_cache_tokens,
        "max_seq_len": min(MAX_SEQ_LEN, target.max_seq_len),
    }
    return Profile(
        fingerprint={
            "device": f"{tp} x {device.name}",
            "engine": ESTIMATE,
            "precision": "bf16",
            "target": target.name,
            "draft": draft.name,
            **{f"scheduler.{name}": str(value) for name, value in limits.items()},
        },
        verify=_verify_samples(PassTime(device, target, tp), kv_cache_tokens),
        draft=_draft_samples(PassTime(device, draft)),
        source=(
            f"{ESTIMATE} from a datasheet roofline, not measured: {device.datasheet}; "
            f"{MEMORY_SHARE:.0%} of its bandwidth, {COMPUTE_SHARE:.0%} of its dense bf16 peak"
        ),
    )


def _verify_samples(seconds: PassTime, kv_cache_tokens: int) -> tuple[VerifySample, ...]:
    contexts = [round(share * kv_cache_tokens) for share in CONTEXTS]
    return tuple(VerifySample(n, n, c, seconds(n, c)) for n in VERIFY_SIZES for c in contexts)


def _draft_samples(forward: PassTime) -> tuple[DraftSample, ...]:
    calls = [(rows, k, rows) for rows in DRAFT_ROWS for k in DRAFT_LENGTHS] + [(1, 1, CATCH_UP)]
    return tuple(
        DraftSample(
            rows, k, tokens, rows * DRAFT_CONTEXT, k * forward(tokens, rows * DRAFT_CONTEXT)
        )
        for rows, k, tokens in calls
    )


def _kv_cache_tokens(device: Device, target: Model, draft: Model, tp: int) -> int:
    weights = target.weights_bytes + draft.weights_bytes
    free = tp * device.memory_bytes * USABLE_MEMORY - weights
    return int(free / (target.kv_bytes + draft.kv_bytes)) // 1024 * 1024


def _num_gpus(device: Device, target: Model, draft: Model) -> int:
    weights = target.weights_bytes + draft.weights_bytes
    usable = device.memory_bytes * USABLE_MEMORY * WEIGHTS_SHARE
    return next(tp for tp in TENSOR_PARALLEL if tp * usable >= weights)


def main() -> None:
    """Write every estimate."""
    for device_name, device in DEVICES.items():
        for pair_name, (target, draft) in PAIRS.items():
            path = FOLDER / f"{device_name}-{pair_name}.json"
            estimate(device, target, draft).save(path)
            print(path.name)


if __name__ == "__main__":
    main()
