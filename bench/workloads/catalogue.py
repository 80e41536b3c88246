"""From what a user writes to a trace or a prompt source: names, data folder, paths."""

from pathlib import Path

from tokenizers import Tokenizer

from bench.bench_options import DATA_ENV
from bench.workloads import Trace
from bench.workloads.prompts import PromptSource, RandomPrompts, spec_bench, standard_library
from bench.workloads.synthetic import PROCESSES, make_trace
from bench.workloads.traces import FORMATS, load_trace

SPEC_BENCH = "prompts/spec_bench.jsonl"

# Name -> format and place in the data folder, under the names the publishers gave the files.
FILES = {
    "azure_2023_code": ("azure_2023", "traces/azure_2023_code.csv"),
    "azure_2023_conv": ("azure_2023", "traces/azure_2023_conv.csv"),
    "azure_2024_code": ("azure_2024", "traces/AzureLLMInferenceTrace_code_1week.csv"),
    "azure_2024_conv": ("azure_2024", "traces/AzureLLMInferenceTrace_conv_1week.csv"),
    "mooncake_conversation": ("mooncake", "traces/conversation_trace.jsonl"),
    "mooncake_toolagent": ("mooncake", "traces/toolagent_trace.jsonl"),
    "burstgpt": ("burstgpt", "traces/BurstGPT_1.csv"),
}


def default_traces(data: Path | None) -> list[str]:
    """Return both Azure traces of 2023 where they are, else Poisson arrivals."""
    names = ["azure_2023_conv", "azure_2023_code"]
    here = data is not None and all((data / FILES[name][1]).is_file() for name in names)
    return names if here else ["poisson"]


def find_trace(spec: str, data: Path | None) -> Trace:
    """Make or read a trace.

    Args:
        spec: a name in `FILES`, `FORMAT:PATH`, or a synthetic one, such as `gamma:2`.

    Raises:
        ValueError: unknown, not there, or malformed.
    """
    head, _, rest = spec.partition(":")
    if head in PROCESSES:
        return make_trace(spec)
    if head in FORMATS and rest:
        return load_trace(Path(rest), head, f"{head}:{Path(rest).stem}")
    if spec not in FILES:
        known = ", ".join([*FILES, *PROCESSES])
        raise ValueError(f"trace is '{spec}': known are {known}, and FORMAT:PATH with one of "
                         f"{', '.join(FORMATS)}")  # fmt: skip
    format_name, place = FILES[spec]
    return load_trace(_folder(data, spec) / place, format_name, spec)


def find_prompts(spec: str, data: Path | None, tokenizer: Tokenizer) -> PromptSource:
    """Make a prompt source.

    Args:
        spec: `stdlib`, `random`, `spec_bench`, or `spec_bench:PATH`.

    Raises:
        ValueError: unknown, not there, or malformed.
    """
    head, _, rest = spec.partition(":")
    if spec == "stdlib":
        return standard_library(tokenizer)
    if spec == "random":
        return RandomPrompts(tokenizer.get_vocab_size())
    if head == "spec_bench":
        path = Path(rest) if rest else _folder(data, spec) / SPEC_BENCH
        return spec_bench(path, tokenizer)
    raise ValueError(f"prompts are '{spec}': known are stdlib, random, spec_bench[:PATH]")


def _folder(data: Path | None, wanted: str) -> Path:
    if data is None:
        raise ValueError(f"'{wanted}' needs a data folder: give --data, or set {DATA_ENV}")
    return data
