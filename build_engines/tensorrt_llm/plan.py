"""The plan: what each engine will be, and the commands that make it.

Only flags of TensorRT-LLM 1.2.1's own scripts appear here; nothing is run.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from build_engines.tensorrt_llm.families import family_of
from build_engines.tensorrt_llm.models import ROLES, Model, download_command
from build_engines.tensorrt_llm.options import Options
from build_engines.tensorrt_llm.quantizations import QUANTIZATIONS, Quantization
from specserve.manifest import Compiled

SHORT = {"bfloat16": "bf16", "float16": "fp16"}
MOST_TOKENS = 8192  # of a sequence, and of a step, unless the options say otherwise

Command = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """One engine.

    Attributes:
        role: `draft` or `target`.
        compiled: its limits, as the manifest will state them.
        max_seq_len: prompt and output tokens of a sequence.
        dtype: of what is not quantized.
        output: the engine folder.
        converted: folder of the TensorRT-LLM checkpoint in between.
        timing_cache: shared by both engines of a pair.
    """

    role: str
    model: Model
    options: Options
    compiled: Compiled
    max_seq_len: int
    dtype: str
    output: Path
    converted: Path
    timing_cache: Path

    @property
    def quantization(self) -> Quantization:
        return QUANTIZATIONS[self.compiled.quantization]

    @property
    def precision(self) -> str:
        return self.quantization.precision or SHORT[self.dtype]

    @property
    def commands(self) -> list[Command]:
        """Return what makes the engine: to a TensorRT-LLM checkpoint, then to an engine."""
        first = self._quantize() if self.quantization.by_modelopt else self._convert()
        return [first, self._build()]

    @property
    def self_check(self) -> Command:
        """Return what loads the engine and runs it, on as many ranks as it has."""
        ranks = self.compiled.world_size
        mpi = ("mpirun", "-n", str(ranks), "--allow-run-as-root") if ranks > 1 else ()
        module = "build_engines.tensorrt_llm.self_check"
        return (*mpi, self.options.python, "-m", module, str(self.output))

    def __str__(self) -> str:
        it = self.compiled
        return (
            f"{self.role}: {self.model.name}, {self.dtype}, weights {self.precision}, "
            f"KV cache {it.kv_cache}, tensor parallel {it.tp_size}, pipeline parallel {it.pp_size}"
        )

    def _convert(self) -> Command:
        folder = family_of(self.model.checkpoint).folder
        script = self.options.examples / "models" / "core" / folder / "convert_checkpoint.py"
        workers = ("--workers", str(self._workers))
        return (self.options.python, str(script), *self._checkpoint_flags(), *workers)

    def _quantize(self) -> Command:
        script = self.options.examples / "quantization" / "quantize.py"
        kv_cache = ("--kv_cache_dtype", "fp8") if self.compiled.kv_cache == "fp8" else ()
        return (self.options.python, str(script), *self._checkpoint_flags(), *kv_cache)

    def _checkpoint_flags(self) -> Command:
        calibration = self.options.calibration if self.quantization.is_calibrated else None
        return (
            *("--model_dir", str(self.model.checkpoint.path)),
            *("--output_dir", str(self.converted)),
            *("--dtype", self.dtype),
            *self.quantization.flags,
            *(("--calib_dataset", str(calibration)) if calibration else ()),
            *("--tp_size", str(self.compiled.tp_size)),
            *("--pp_size", str(self.compiled.pp_size)),
        )

    def _build(self) -> Command:
        it, cache = self.compiled, str(self.timing_cache)
        verifies = ("--speculative_decoding_mode", "draft_tokens_external")
        draft_len = ("--max_draft_len", str(it.max_draft_len))
        return (
            "trtllm-build",
            *("--checkpoint_dir", str(self.converted)),
            *("--output_dir", str(self.output)),
            *("--gemm_plugin", "auto"),
            *("--kv_cache_type", "paged"),
            *("--use_paged_context_fmha", "enable"),
            *(("--use_fp8_context_fmha", "enable") if it.kv_cache == "fp8" else ()),
            *("--tokens_per_block", str(it.tokens_per_block)),
            *("--max_beam_width", "1"),
            *("--max_batch_size", str(it.max_batch_size)),
            *("--max_input_len", str(it.max_input_len)),
            *("--max_seq_len", str(self.max_seq_len)),
            *("--max_num_tokens", str(it.max_num_tokens)),
            *((*verifies, *draft_len) if it.max_draft_len else ()),
            *("--input_timing_cache", cache),  # ignored while it is not there
            *("--output_timing_cache", cache),
            *("--workers", str(self._workers)),
        )

    @property
    def _workers(self) -> int:
        return min(self.options.workers, self.compiled.world_size)


def make_plan(models: Mapping[str, Model], options: Options, output: Path) -> list[EnginePlan]:
    """Plan both engines, the draft's first.

    The two get the same limits. Every call sends a whole sequence, draft included, and neither has
    more tokens than the sequence will have, so `max_input_len` is `max_seq_len`. To that the
    builder adds `max_draft_len` by itself where the mode is set.

    Raises:
        ValueError: on a limit that contradicts another.
    """
    longest = min(MOST_TOKENS, *(model.max_seq_len for model in models.values()))
    max_seq_len = options.max_seq_len or longest
    room = max_seq_len - options.tokens_per_block
    if options.max_draft_len > room:
        raise ValueError(
            f"--max-draft-len is {options.max_draft_len}, and --max-seq-len {max_seq_len} leaves "
            f"{room} beside a block of {options.tokens_per_block}: lower the one or raise the other"
        )
    return [_plan(role, models[role], options, output, max_seq_len) for role in ROLES]


def script(plans: list[EnginePlan]) -> str:
    """Write the commands as a shell script."""
    lines = []
    for plan in plans:
        lines.append(f"# {plan}")
        if not plan.quantization.is_listed:
            lines.append(
                f"# upstream lists FP16, BF16 and FP8 for draft_tokens_external, not "
                f"{plan.compiled.quantization}"
            )
        if not plan.model.is_on_disk:
            lines.append(f"# {shlex.join(download_command(plan.model))}")
        lines += [shlex.join(command) for command in plan.commands]
    lines.append("# both loaded, a token from each, a draft token verified")
    lines += [shlex.join(plan.self_check) for plan in plans]
    return "\n".join(lines) + "\n"


def _plan(role: str, model: Model, options: Options, output: Path, max_seq_len: int) -> EnginePlan:
    is_target = role == "target"
    dtype = model.dtype if options.dtype == "auto" else options.dtype
    name = options.quantization
    if not is_target:
        name = options.draft_quantization or name
    uses_fp8 = options.kv_cache == "fp8" or (options.kv_cache == "auto" and name == "fp8")
    rows = options.max_batch_size
    step_tokens = rows * (options.max_draft_len + options.tokens_per_block)
    all_tokens = rows * max_seq_len
    compiled = Compiled(
        quantization=name,
        kv_cache="fp8" if uses_fp8 else SHORT[dtype],
        vocab_rows=model.checkpoint.vocab_size,
        max_batch_size=rows,
        max_input_len=max_seq_len,
        max_num_tokens=options.max_num_tokens or min(max(MOST_TOKENS, step_tokens), all_tokens),
        max_draft_len=options.max_draft_len if is_target else 0,
        tokens_per_block=options.tokens_per_block,
        tp_size=options.tp_size if is_target else options.draft_tp_size,
        pp_size=options.pp_size if is_target else 1,
    )
    return EnginePlan(
        role=role,
        model=model,
        options=options,
        compiled=compiled,
        max_seq_len=max_seq_len,
        dtype=dtype,
        output=output / role,
        converted=output / "converted" / role,
        timing_cache=options.timing_cache or output / "timing.cache",
    )
