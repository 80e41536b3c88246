"""Train the demo pair: tokenizer, target, the target's own sequences, draft distilled on them.

Training stops by the clock, so two runs never give the same weights, only the same recipe on the
same data. The demo pair that ships took 50 and 27 minutes on two cores.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from build_engines import corpus, openvino, sequences
from build_engines.stateful_model import StatefulModel

HEAD_DIM, MAX_SEQ_LEN = 64, 4096
TARGET_SHAPE = {"hidden": 384, "layers": 8, "kv_heads": 2, "ffn": 1024}
DRAFT_SHAPE = {"hidden": 256, "layers": 2, "kv_heads": 2, "ffn": 704}
TARGET_ROWS, TARGET_TOKENS = 8, 512
DRAFT_ROWS = 16
DRAFT_TOKENS = sequences.PROMPT_TOKENS + sequences.OUTPUT_TOKENS
OWN_SHARE = 2 / 3  # of the draft's batches: the target's own sequences; the rest is corpus
KL_SHARE = 0.6  # of the draft's loss: KL(target || draft); the rest is cross-entropy to its argmax
WARM_UP_STEPS = 100

Ids = NDArray[np.int64]


def train(
    output_dir: str | Path, *, target_minutes: float, draft_minutes: float, num_sequences: int
) -> None:
    """Write the checkpoints `target/` and `draft/`.

    Raises:
        ValueError: if one of them is there already.
    """
    output = Path(output_dir)
    for folder in (output / "target", output / "draft"):
        if folder.exists():
            raise ValueError(f"{folder} is there already: choose another output")
    documents = corpus.library_documents()
    tokenizer = corpus.train_tokenizer(documents)
    text = corpus.encode(tokenizer, corpus.split(documents)[0])
    print(f"{len(documents)} documents, {len(text)} training tokens", flush=True)

    torch.manual_seed(0)
    target = make_model(**TARGET_SHAPE)
    fit(target, text_loss(target, text), target_minutes, learning_rate=1.5e-3, floor=0.05)
    save(target, tokenizer, output / "target")

    own = own_sequences(output / "target", text, num_sequences)
    torch.manual_seed(1)
    draft = make_model(**DRAFT_SHAPE)
    loss = distillation_loss(draft, target.eval(), text, own)
    fit(draft, loss, draft_minutes, learning_rate=2e-3, floor=0.03)
    save(draft, tokenizer, output / "draft")


def make_model(*, hidden: int, layers: int, kv_heads: int, ffn: int) -> LlamaForCausalLM:
    """Make an untrained Llama with tied embeddings, in f32."""
    config = LlamaConfig(
        vocab_size=corpus.VOCAB_SIZE,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_SEQ_LEN,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def fit(
    model: LlamaForCausalLM,
    losses: Iterator[Tensor],
    minutes: float,
    *,
    learning_rate: float,
    floor: float,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run AdamW until the time is up; the learning rate falls along a cosine to `floor` of itself.

    Args:
        losses: one scalar per step, computed when asked for.

    Returns:
        The number of steps, at least one.
    """
    name = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    model.train()
    start = clock()
    for step in itertools.count():
        done = (clock() - start) / (minutes * 60)
        if step and done >= 1:
            return step
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        for group in optimizer.param_groups:
            warm_up = min(1.0, step / WARM_UP_STEPS)
            group["lr"] = learning_rate * warm_up * (floor + (1 - floor) * cosine)
        loss = next(losses)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"{name} step {step}, {done:.0%}, loss {loss.item():.3f}", flush=True)
    raise AssertionError("count() ends never")


def text_loss(model: LlamaForCausalLM, text: Ids) -> Iterator[Tensor]:
    """Yield the next-token cross-entropy of random pieces of a text."""
    rng = np.random.default_rng(42)
    while True:
        ids = random_pieces(text, TARGET_ROWS, TARGET_TOKENS + 1, rng)
        logits = forward(model, ids[:, :-1])
        yield F.cross_entropy(logits, ids[:, 1:].reshape(-1))


def distillation_loss(
    draft: LlamaForCausalLM, target: LlamaForCausalLM, text: Ids, own: Ids
) -> Iterator[Tensor]:
    """Yield how far the draft is from the target, on the target's own sequences and the text.

    Args:
        own: [num_sequences, DRAFT_TOKENS].
    """
    rng = np.random.default_rng(7)
    while True:
        if rng.random() < OWN_SHARE:
            ids = torch.from_numpy(own[rng.integers(0, len(own), DRAFT_ROWS)])
        else:
            ids = random_pieces(text, DRAFT_ROWS, DRAFT_TOKENS, rng)
        mine = forward(draft, ids)
        with torch.no_grad():
            theirs = forward(target, ids)
        divergence = F.kl_div(
            F.log_softmax(mine, -1),
            F.log_softmax(theirs, -1),
            log_target=True,
            reduction="batchmean",
        )
        choice = F.cross_entropy(mine, theirs.argmax(-1))
        yield KL_SHARE * divergence + (1 - KL_SHARE) * choice


def forward(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Run a model in bf16 and return f32 logits [rows * n, vocab_size] for token ids [rows, n]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, use_cache=False).logits
    return logits.float().flatten(0, 1)


def random_pieces(text: Ids, num_rows: int, length: int, rng: np.random.Generator) -> Tensor:
    """Cut [num_rows, length] token ids out of random places of a text."""
    starts = rng.integers(0, len(text) - length + 1, num_rows)
    return torch.from_numpy(text[starts[:, None] + np.arange(length)])


def own_sequences(target_dir: Path, text: Ids, num_sequences: int) -> Ids:
    """Export the target for the time it takes to write its sequences."""
    with tempfile.TemporaryDirectory() as scratch:
        openvino.build(target_dir, scratch, precision="bf16")
        return sequences.generate(StatefulModel(scratch), text, num_sequences)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a bf16 checkpoint with its tokenizer; the model in memory stays f32."""
    model.to(torch.bfloat16).save_pretrained(folder)
    model.float()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=corpus.BOS, eos_token=corpus.EOS
    ).save_pretrained(folder)
