"""What the stand-ins of convert_checkpoint.py and quantize.py share."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from trtllm_toolchain.record import record

DTYPES = ["auto", "float16", "bfloat16", "float32"]


def parser() -> argparse.ArgumentParser:
    """Return a parser with what both take; it knows no abbreviations, unlike the real ones."""
    it = argparse.ArgumentParser(allow_abbrev=False)
    it.add_argument("--model_dir", required=True)
    it.add_argument("--output_dir", required=True)
    it.add_argument("--dtype", choices=DTYPES, default="auto")
    it.add_argument("--tp_size", type=int, default=1)
    it.add_argument("--pp_size", type=int, default=1)
    it.add_argument("--calib_dataset")
    it.add_argument("--calib_size", type=int, default=512)
    return it


def convert_parser() -> argparse.ArgumentParser:
    """Return what `convert_checkpoint.py` takes, whatever the family."""
    it = parser()
    it.add_argument("--use_weight_only", action="store_true")
    it.add_argument("--weight_only_precision", choices=["int8", "int4"], default="int8")
    it.add_argument("--smoothquant", type=float)
    it.add_argument("--per_channel", action="store_true")
    it.add_argument("--per_token", action="store_true")
    it.add_argument("--int8_kv_cache", action="store_true")
    it.add_argument("--load_model_on_cpu", action="store_true")
    it.add_argument("--workers", type=int, default=1)
    return it


def quantize_parser() -> argparse.ArgumentParser:
    """Return what `quantize.py` takes."""
    it = parser()
    formats = ["fp8", "int8_sq", "int4_awq", "w4a8_awq", "int8_wo", "int4_wo", "full_prec"]
    it.add_argument("--qformat", choices=formats, default="full_prec")
    it.add_argument("--kv_cache_dtype", choices=["int8", "fp8"])
    it.add_argument("--awq_block_size", type=int, default=128)
    return it


def convert_checkpoint(family: str) -> None:
    """Be the `convert_checkpoint.py` of a family."""
    record(f"{family}/convert_checkpoint.py", sys.argv[1:])
    options = convert_parser().parse_args()
    algo = None
    if options.use_weight_only:
        algo = {"int8": "W8A16", "int4": "W4A16"}[options.weight_only_precision]
    elif options.smoothquant:
        algo = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"
    write(options, algo, "INT8" if options.int8_kv_cache else None)


def quantize() -> None:
    """Be `quantize.py`."""
    record("quantize.py", sys.argv[1:])
    options = quantize_parser().parse_args()
    algo = {"fp8": "FP8", "int4_awq": "W4A16_AWQ"}.get(options.qformat)
    write(options, algo, "FP8" if options.kv_cache_dtype == "fp8" else None)


def write(options: argparse.Namespace, algo: str | None, kv_algo: str | None) -> None:
    """Write the config.json of a TensorRT-LLM checkpoint."""
    if not (Path(options.model_dir) / "config.json").is_file():
        sys.exit(f"no model in {options.model_dir}")
    if os.environ.get("STAND_IN_FAILS") == "convert":
        sys.exit(3)
    mapping = {"tp_size": options.tp_size, "pp_size": options.pp_size}
    quantization = {"quant_algo": algo, "kv_cache_quant_algo": kv_algo}
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"dtype": options.dtype, "mapping": mapping, "quantization": quantization}
    (folder / "config.json").write_text(json.dumps(config))
