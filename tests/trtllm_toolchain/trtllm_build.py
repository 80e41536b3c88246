"""Be `trtllm-build`: documented flags only, and the builder's own changes to what was asked."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from trtllm_toolchain.record import record

PLUGINS = ["auto", "float16", "float32", "bfloat16", "fp8", "disable"]
SWITCH = ["enable", "disable"]
MODES = ["draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens", "eagle"]


def build_parser() -> argparse.ArgumentParser:
    """Return what `trtllm-build` takes."""
    it = argparse.ArgumentParser("trtllm-build", allow_abbrev=False)
    it.add_argument("--checkpoint_dir", required=True)
    it.add_argument("--output_dir", default="engine_outputs")
    it.add_argument("--max_batch_size", type=int, default=2048)
    it.add_argument("--max_input_len", type=int, default=1024)
    it.add_argument("--max_seq_len", type=int)
    it.add_argument("--max_beam_width", type=int, default=1)
    it.add_argument("--max_num_tokens", type=int, default=8192)
    it.add_argument("--kv_cache_type", choices=["continuous", "paged", "disabled"], default="paged")
    it.add_argument("--gemm_plugin", choices=PLUGINS)
    it.add_argument("--use_paged_context_fmha", choices=SWITCH, default="enable")
    it.add_argument("--use_fp8_context_fmha", choices=SWITCH, default="enable")
    it.add_argument("--tokens_per_block", type=int, default=32)
    it.add_argument("--speculative_decoding_mode", choices=MODES)
    it.add_argument("--max_draft_len", type=int, default=0)
    it.add_argument("--input_timing_cache")
    it.add_argument("--output_timing_cache", default="model.cache")
    it.add_argument("--workers", type=int, default=1)
    return it


def main() -> None:
    version = os.environ["STAND_IN_VERSION"]
    print(f"[TensorRT-LLM] TensorRT LLM version: {version}")
    options = build_parser().parse_args()
    record("trtllm-build", sys.argv[1:])
    pretrained = json.loads((Path(options.checkpoint_dir) / "config.json").read_text())
    seq_len = options.max_seq_len
    num_tokens = min(options.max_num_tokens, seq_len * options.max_batch_size)
    if options.speculative_decoding_mode:
        seq_len += options.max_draft_len
        num_tokens = max(num_tokens, options.max_batch_size * (options.max_draft_len + 1))
    quantization = pretrained["quantization"]
    fp8_attention = quantization["quant_algo"] == "FP8" and "STAND_IN_OLD_GPU" not in os.environ
    paged = options.use_paged_context_fmha == "enable"
    if quantization["kv_cache_quant_algo"] == "FP8" and not fp8_attention:
        print("FP8 Paged Context FMHA is disabled because FP8 context FMHA is disabled.")
        paged = False
    config = {
        "version": version,
        "pretrained_config": pretrained,
        "build_config": {
            "max_batch_size": options.max_batch_size,
            "max_input_len": min(options.max_input_len, options.max_seq_len),
            "max_seq_len": seq_len,
            "max_num_tokens": num_tokens,
            "max_draft_len": options.max_draft_len,
            "kv_cache_type": options.kv_cache_type.upper(),
            "plugin_config": {
                "use_paged_context_fmha": paged,
                "tokens_per_block": options.tokens_per_block,
            },
        },
    }
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mapping = pretrained["mapping"]
    for rank in range(mapping["tp_size"] * mapping["pp_size"]):
        (folder / f"rank{rank}.engine").write_bytes(b"engine")
    Path(options.output_timing_cache).write_bytes(b"timings")


if __name__ == "__main__":
    main()
