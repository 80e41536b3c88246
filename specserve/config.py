"""The configuration tree: frozen, strict, read once from a TOML file.

Owns defaults, types and the meaning of `--set section.key=value`. Must not know what the values do.
"""

import dataclasses
import difflib
import json
import os
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

CONFIG_ENV = "SPECSERVE_CONFIG"
CHECKPOINTS = Path(__file__).resolve().parent.parent / "build_engines" / "demo_pair"
DEMO_PAIR = CHECKPOINTS / "openvino"
DEMO_PAIRS = {"torch": CHECKPOINTS}  # of the engines that do not run DEMO_PAIR

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Which engine runs the pair, and how.

    Attributes:
        name: an entry of `specserve.engines.ENGINES`.
        dir: folder with `target/` and `draft/`, each an engine folder with a manifest; empty takes
            the demo pair, as this engine reads it.
        precision: arithmetic of the forward pass, `f32`, `bf16` or, on `torch`, `f16`. In f32,
            greedy output does not depend on what else is in the batch; the others are faster and
            may flip an argmax tie.
        device: of the `torch` engine, `cpu` or `cuda`.
        compile: `torch` on a GPU: fuse each layer's small kernels. Faster, but the first start
            takes a minute more.
        num_threads: CPU threads of each engine; 0 takes all cores.
        unpacked_from: `openvino` in f32 on bf16 weights: passes of at least so many tokens use a
            copy of the weights in f32, which takes 4 bytes a parameter and spares unpacking them
            every time; 0 keeps no copy.
        block_size: token slots of a KV block; the CPU kernels of `openvino` support 32.
    """

    name: str = "openvino"
    dir: str = ""
    precision: str = "f32"
    device: str = "cpu"
    compile: bool = False
    num_threads: int = 0
    unpacked_from: int = 5
    block_size: int = 32

    def __post_init__(self) -> None:
        """Fill in the demo pair."""
        if not self.dir:
            object.__setattr__(self, "dir", str(DEMO_PAIRS.get(self.name, DEMO_PAIR)))


@dataclass(frozen=True, slots=True)
class TensorRTLLMConfig:
    """The `tensorrt_llm` engine; the size of its KV cache is `scheduler.kv_cache_tokens`.

    Attributes:
        mode: `leader`, where this process is a rank, the only one or one that mpirun has started;
            or `orchestrator`, where it starts the ranks, which an engine on several GPUs needs
            inside Triton.
        draft_devices: GPUs of the draft's ranks; empty takes the first ones.
        target_devices: the same for the target.
        worker: program of a rank, for `orchestrator`; empty is TensorRT-LLM's own.
        draft_stop: `step` stops a draft at any token, by how sure the draft is of it; `plan` fixes
            its length beforehand; `auto` takes `step` where the draft runs on one GPU.
        chunked_context: the executor may split a prompt over several of its passes.
        sends_chunks: compute every chunk of a prompt when it is scheduled, so that prompts leave
            decoding requests on schedule; else a prompt is computed whole with its last chunk.
        prompt_ignore_length: this TensorRT-LLM has that sampling parameter, which makes presence
            and frequency penalties possible; an error at start if it has not.
    """

    mode: str = "leader"
    draft_devices: tuple[int, ...] = ()
    target_devices: tuple[int, ...] = ()
    worker: str = ""
    draft_stop: str = "auto"
    chunked_context: bool = True
    sends_chunks: bool = False
    prompt_ignore_length: bool = False


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step and of the memory behind it.

    Attributes:
        max_num_seqs: rows of a step.
        max_num_batched_tokens: target tokens of a step, base and draft together.
        prefill_chunk_tokens: prompt tokens of a step, all rows together.
        kv_cache_tokens: token slots of each engine's KV cache.
        max_seq_len: prompt and output tokens of a request; 0 takes the engine's own limit.
        max_waiting_requests: more are refused, but for classes that have less than their share.
        max_waiting_tokens: the same for the prompt tokens of those that wait.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    prefill_chunk_tokens: int = 256
    kv_cache_tokens: int = 32768
    max_seq_len: int = 0
    max_waiting_requests: int = 512
    max_waiting_tokens: int = 131072


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """How much to draft.

    Attributes:
        name: an entry of `specserve.policies.POLICIES`.
        num_draft_tokens: draft length of the `fixed` policy.
        max_draft_tokens: hard cap per row and step, for every policy.
        max_lookup_tokens: that of `specserve` for what prompt lookup proposes, which costs nothing
            to draft; where a text repeats itself, long drafts are accepted whole. A TensorRT-LLM
            target takes as many as it was built for, if that is less.
        draft_source: of requests that name none: `model`, `ngram` (prompt lookup), `auto` (what
            promises more, step by step), or `none`.
        min_survival: `adaptive` stops a row when the calibrated probability that its whole draft
            is accepted falls below this.
        profile: file written by `specserve profile`; empty takes the stored one of this machine
            and pair, or measures a quick one.
        confidence_threshold: `threshold` drafts while the newest confidence reaches this; 0.6 is
            usual for the mean.
        threshold_of_mean: `threshold` asks the mean of the batch, not each row.
        as_in_adaspec: `smartspec` takes its acceptance rate as AdaSpec's code does.
        slo_check: `adaspec_released` checks its SLO, which its code has commented out.
        slo_tpot_s: the one TPOT objective of `adaspec_released` and `adaspec_repaired`; inf for
            none.
    """

    name: str = "specserve"
    num_draft_tokens: int = 4
    max_draft_tokens: int = 8
    max_lookup_tokens: int = 16
    draft_source: str = "auto"
    min_survival: float = 0.35
    profile: str = ""
    confidence_threshold: float = 0.4
    threshold_of_mean: bool = False
    as_in_adaspec: bool = False
    slo_check: bool = False
    slo_tpot_s: float = 0.04


@dataclass(frozen=True, slots=True)
class SLOConfig:
    """What latency objectives lead to.

    Attributes:
        reject_late_classes: requests of these priority classes are refused early, with the
            predicted wait, when they cannot meet their TTFT; others are served as well as can be.
        best_effort_ttft_s: a request without a TTFT objective waits in line as if it had this one.
        shares: weight of each priority class while several wait, `{interactive = 4, batch = 1}`;
            all classes not named have 1 together.
    """

    reject_late_classes: tuple[str, ...] = ("interactive",)
    best_effort_ttft_s: float = 30.0
    shares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """What one request may ask for.

    Attributes:
        max_text_bytes: of a prompt; tokenizing one takes about 4 s per megabyte.
        max_parameters: Triton's request parameters, which is what unknown HTTP keys become.
        max_request_s: a request that has not ended after this long fails, whatever timeout it asks
            for.
    """

    max_text_bytes: int = 262_144
    max_words: int = 64
    max_word_bytes: int = 1024
    max_logit_bias: int = 1024
    max_parameters: int = 64
    max_request_s: float = 600.0


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Behaviour at the edge.

    Attributes:
        exclude_input_in_output: default of the tensor of that name.
        draft_retry_s: after a failure of the draft engine, wait this long before trying it again;
            twice as long after every further one.
        draft_timeout_s: a draft call that takes longer is given up, and the draft model's process
            is replaced; what drafts in that step is late by as much.
        target_timeout_s: the same for the target model; what is in flight fails then.
        json_logs: our log lines are JSON, in the fields of OpenTelemetry's log data model; Triton's
            own stay as they are.
    """

    exclude_input_in_output: bool = True
    draft_retry_s: float = 5.0
    draft_timeout_s: float = 5.0
    target_timeout_s: float = 60.0
    json_logs: bool = False


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    """What the GPU says of itself.

    Attributes:
        source: `nvml` or `none`; `auto` is `nvml` for engines that need a GPU.
        devices: indices or UUIDs of the GPUs or MIG instances that the engines run on; empty takes
            CUDA_VISIBLE_DEVICES, and every device if that is not set.
        interval_s: between two readings.
        stale_after_s: an older reading is not used.
        min_free_bytes: with less free device memory than this, fewer requests are let in.
    """

    source: str = "auto"
    devices: tuple[str, ...] = ()
    interval_s: float = 0.25
    stale_after_s: float = 5.0
    min_free_bytes: int = 268_435_456


@dataclass(frozen=True, slots=True)
class OpenAIConfig:
    """The OpenAI endpoint.

    Attributes:
        model_name: what clients call the model.
        chat_template: file with a Jinja template; empty takes the tokenizer's own, or a plain one
            if it has none.
        api_key_file: file with a bearer token in each line; empty lets everybody in.
        tls_cert_file: PEM file of the certificate chain; empty speaks plain HTTP.
        tls_key_file: PEM file of its private key.
        max_body_bytes: size of a request body.
        max_choices: generations behind one request: prompts times `n`.
    """

    model_name: str = "specserve"
    chat_template: str = ""
    api_key_file: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""
    max_body_bytes: int = 4_194_304
    max_choices: int = 32


@dataclass(frozen=True, slots=True)
class Config:
    """The whole tree."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    tensorrt_llm: TensorRTLLMConfig = field(default_factory=TensorRTLLMConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    slo: SLOConfig = field(default_factory=SLOConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    openai: OpenAIConfig = field(default_factory=OpenAIConfig)


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `section.key=value` overrides on top.

    Args:
        path: None reads the file that the environment variable SPECSERVE_CONFIG names, if any.

    Raises:
        ValueError: unknown key (naming the nearest valid one), wrong type, or bad TOML.
    """
    if path is None and os.environ.get(CONFIG_ENV):
        path = Path(os.environ[CONFIG_ENV])
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read config file {path}: {error.strerror}") from error
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(tree, override)
    return build(Config, tree, "config")


def dump_config(config: Config) -> str:
    """Write the tree as TOML that `load_config` reads back to an equal tree."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        values = getattr(config, section.name)
        lines += [
            f"{f.name} = {_toml(getattr(values, f.name))}" for f in dataclasses.fields(values)
        ]
        lines.append("")
    return "\n".join(lines)


def build(cls: type[T], tree: Mapping[str, Any], where: str) -> T:
    """Make a dataclass from a mapping, refusing unknown keys and wrong types.

    Raises:
        ValueError: naming the key, the nearest valid one, or the expected type.
    """
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key '{key}' in {where}: did you mean '{near}'?")
        values[key] = _convert(hints[key], value, f"{where}.{key}")
    return cls(**values)


def _convert(expected: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r}, expected a table")
        return build(expected, value, where)
    if typing.get_origin(expected) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} is {value!r}, expected a list")
        kind = typing.get_args(expected)[0]
        return tuple(_convert(kind, item, f"{where}[{i}]") for i, item in enumerate(value))
    if typing.get_origin(expected) is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r}, expected a table")
        kind = typing.get_args(expected)[1]
        return {key: _convert(kind, item, f"{where}.{key}") for key, item in value.items()}
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        expected = typing.get_args(expected)
    else:
        expected = (expected,)
    if float in expected and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if (isinstance(value, bool) and bool not in expected) or not isinstance(value, expected):
        names = " or ".join(kind.__name__ for kind in expected)
        raise ValueError(f"{where} is {value!r}, expected {names}")
    return value


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    section, dot, key = name.partition(".")
    if not (separator and dot):
        raise ValueError(f"override '{override}' is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare string, as one writes it in a shell
    table = tree.setdefault(section, {})
    if not isinstance(table, dict):
        raise ValueError(f"{section} is {table!r} in the file, expected a table: cannot set {key}")
    table[key] = value


def _toml(value: bool | int | float | str | tuple[Any, ...] | dict[str, float]) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(v)}" for key, v in value.items()) + "}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace(
            "\x7f", "\\u007f"
        )  # a JSON string is a TOML string
    return repr(value)
