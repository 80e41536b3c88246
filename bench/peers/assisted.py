"""Hugging Face assisted generation: one request at a time, on the checkpoints the IR came from."""

import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from bench.peers import Load, Run
from specserve.text import load_tokenizer

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
ASSISTANT_SETTINGS = (
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
)


class Transformers:
    """`generate` with an assistant model; `default` is the library's own adaptive setting.

    Args:
        target, draft: Hugging Face checkpoints.
    """

    arms = ("plain", "fixed_2", "fixed_4", "fixed_6", "fixed_8", "default")
    max_concurrency = 1

    def __init__(self, target: Path, draft: Path, precision: str, num_threads: int) -> None:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        torch.set_num_threads(num_threads)
        self._tokenizer: Tokenizer = load_tokenizer(target)
        self._target, self._draft = (
            AutoModelForCausalLM.from_pretrained(
                path, dtype=DTYPES[precision], local_files_only=True
            ).eval()
            for path in (target, draft)
        )
        for model in (self._target, self._draft):  # what a call leaves open is taken from here
            model.generation_config.eos_token_id = None

    def run(self, arm: str, load: Load) -> Run:
        """Serve a load, one prompt after the other. See `Peer`."""
        self._set_assistant(arm)
        assistant = {} if arm == "plain" else {"assistant_model": self._draft}
        config = GenerationConfig(
            max_new_tokens=load.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        outputs: list[list[int]] = []
        started = time.perf_counter()
        for prompt in load.prompts:
            ids = torch.tensor([prompt])
            output = self._target.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, **assistant
            )
            outputs.append(output[0, len(prompt) :].tolist())
        seconds = time.perf_counter() - started
        texts = [self._tokenizer.decode(ids) for ids in outputs]
        return Run(sum(map(len, outputs)), seconds, texts)

    def _set_assistant(self, arm: str) -> None:
        """Fix the draft length, or leave all three settings to the library."""
        kind, _, k = arm.partition("_")
        values = (int(k), "constant", 0.0) if kind == "fixed" else (None, None, None)
        for name, value in zip(ASSISTANT_SETTINGS, values, strict=True):
            setattr(self._draft.generation_config, name, value)
