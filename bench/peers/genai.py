"""OpenVINO GenAI: continuous batching and speculative decoding in C++, on the very same IR."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from openvino_tokenizers import convert_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from bench.peers import Load, Run
from specserve.text import load_tokenizer

ROLES = ("target", "draft")
CACHE_GB = 1
MAX_NGRAM = 3  # as in GenAI's documentation of prompt lookup


class OpenVINOGenAI:
    """Three pipelines: plain, with a draft model, with prompt lookup; arms differ in lengths.

    Prompts go in as token ids and ids come out, step by step in this process: no transport and no
    detokenization is charged to it. Prefix caching is off, since prompts repeat between rounds.

    Args:
        pair: folder with the IR of `target/` and `draft/`.
        scratch: where to put what GenAI wants beside an IR: its tokenizer as a model.
    """

    arms = (
        "plain", "fixed_2", "fixed_4", "fixed_6", "fixed_8", "threshold_0.4",
        "lookup_2", "lookup_4", "lookup_8",
    )  # fmt: skip
    max_concurrency = 32

    def __init__(self, pair: Path, scratch: Path, precision: str, num_threads: int) -> None:
        target, draft = (_with_tokenizer(pair / role, scratch / role) for role in ROLES)
        properties = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "INFERENCE_NUM_THREADS": num_threads,
        }
        model = genai.draft_model(str(draft), "CPU", **properties)
        self._tokenizer: Tokenizer = load_tokenizer(target)
        self._plain = self._pipeline(target, properties)
        self._drafting = self._pipeline(target, {**properties, "draft_model": model})
        self._lookup = self._pipeline(target, {**properties, "prompt_lookup": True})

    def run(self, arm: str, load: Load) -> Run:
        """Serve a load. See `Peer`."""
        pipelines = {"plain": self._plain, "lookup": self._lookup}
        pipeline = pipelines.get(arm.partition("_")[0], self._drafting)
        config = _generation_config(arm, load.max_tokens)
        prompts = [ov.Tensor(np.array([ids], dtype=np.int64)) for ids in load.prompts]
        outputs: list[list[int]] = [[] for _ in prompts]
        waiting, running = list(enumerate(prompts))[::-1], {}
        started = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < load.concurrency:
                i, prompt = waiting.pop()
                running[i] = pipeline.add_request(i, prompt, config)
            pipeline.step()
            for i, handle in list(running.items()):
                while handle.can_read():
                    outputs[i] += next(iter(handle.read().values())).generated_ids
                if handle.get_status() != genai.GenerationStatus.RUNNING:
                    del running[i]
        seconds = time.perf_counter() - started
        texts = [self._tokenizer.decode(ids) for ids in outputs]
        return Run(sum(map(len, outputs)), seconds, texts)

    def _pipeline(self, target: Path, properties: Mapping[str, Any]) -> Any:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.max_num_batched_tokens = 256
        scheduler.max_num_seqs = self.max_concurrency
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        return genai.ContinuousBatchingPipeline(
            str(target), scheduler_config=scheduler, device="CPU", properties=dict(properties)
        )


def _generation_config(arm: str, max_tokens: int) -> Any:
    config = genai.GenerationConfig()
    config.max_new_tokens = max_tokens
    config.ignore_eos = True
    config.do_sample = False
    kind, _, value = arm.partition("_")
    if kind == "fixed":
        config.num_assistant_tokens = int(value)
    elif kind == "threshold":
        config.assistant_confidence_threshold = float(value)
    elif kind == "lookup":
        config.num_assistant_tokens = int(value)
        config.max_ngram_size = MAX_NGRAM
    return config


def _with_tokenizer(engine_dir: Path, folder: Path) -> Path:
    """Link an engine's files into a folder of their own and convert the tokenizer there."""
    folder.mkdir(parents=True)
    for file in engine_dir.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    tokenizer = AutoTokenizer.from_pretrained(engine_dir, local_files_only=True)
    models = convert_tokenizer(tokenizer, with_detokenizer=True)
    for name, model in zip(("tokenizer", "detokenizer"), models, strict=True):
        ov.save_model(model, folder / f"openvino_{name}.xml")
    return folder
