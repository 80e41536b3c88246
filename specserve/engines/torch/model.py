"""A Hugging Face decoder with a paged KV cache: passes over flat ragged batches, on its device."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from specserve.engines.paged_model import FlatBatch
from specserve.engines.torch.attention import NAME, PagedKV, attend_plainly
from specserve.engines.torch.captured import Captured
from specserve.engines.torch.inputs import Inputs

# Their rotation depends on the longest sequence of a batch: a request would change its neighbours.
UNSUPPORTED_ROPE = {"dynamic", "longrope"}


class TorchModel:
    """Any decoder-only model whose attention goes through transformers' attention interface.

    Implements `PagedModel`; what stays on the device goes through `hidden_of`, `run` and `logits`.

    Args:
        checkpoint: Hugging Face folder.
        num_blocks: of `block_size` token slots each.
        max_seq_len: the longest context, which sizes the block tables.
        max_tokens: of one pass; a longer batch takes several.
        dtype: of arithmetic and KV cache.
        sizes: rising numbers of tokens to which passes are padded, up to `max_tokens`; on CUDA each
            is captured as a graph. Empty pads nothing.
        compiler: backend of `torch.compile` that fuses the small kernels of each layer; empty for
            none.

    Attributes:
        inputs: what the next pass reads.
        hidden: [max_tokens, hidden size], what the last pass made of each token.

    Raises:
        ValueError: the model is of a kind that cannot be served, and why.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        num_blocks: int,
        block_size: int = 32,
        max_seq_len: int = 4096,
        max_tokens: int = 512,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        sizes: tuple[int, ...] = (),
        compiler: str = "",
    ) -> None:
        self.device = torch.device(device)
        self._body, given, self._head = _split(_load(checkpoint, dtype).to(self.device))
        config = self._head.config
        self.vocab_size: int = config.vocab_size
        self.inputs = Inputs(max_tokens, -(-max_seq_len // block_size), self.device)
        self.hidden = torch.zeros((max_tokens, config.hidden_size), dtype=dtype, device=self.device)
        attend, self._group_size = attend_plainly, max_tokens
        if self.device.type == "cuda":
            from specserve.engines.torch import kernel

            heads_per_kv_head = config.num_attention_heads // _num_kv_heads(config)
            attend, self._group_size = kernel.attend, kernel.queries_per_program(heads_per_kv_head)
        self._kv = PagedKV(num_blocks, block_size, attend)
        given.kind = type(self._forward(1))  # allocates the KV cache, too
        if len(self._kv.layers) != config.num_hidden_layers:
            raise ValueError(
                f"{len(self._kv.layers)} of {config.num_hidden_layers} layers have attention with "
                "a KV cache of their own: the torch engine needs all"
            )
        if compiler:
            _compile_layers(self._body, compiler)
        self._pass = Captured(self._run, sizes, self.device)
        self._pass.leave_out_slow()

    def forward(self, batch: FlatBatch, logit_rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run one pass. See `PagedModel`."""
        logits: NDArray[np.float32] = self.logits(self.hidden_of(batch, logit_rows)).cpu().numpy()
        return logits

    def hidden_of(self, batch: FlatBatch, tokens: NDArray[np.int64]) -> Tensor:
        """Run a batch; return the hidden states [n, hidden size] of the tokens [n] asked for.

        Args:
            tokens: rising.
        """
        self.inputs.load_tables(batch)
        found = []
        for begin in range(0, len(batch.token_ids), self.inputs.max_tokens):
            end = min(begin + self.inputs.max_tokens, len(batch.token_ids))
            wanted = tokens[(tokens >= begin) & (tokens < end)] - begin
            self.inputs.load_tokens(
                batch,
                begin,
                end,
                num_padded=self.padded(end - begin),
                group_size=self._group_size,
                wanted=wanted,
            )
            self.run(end - begin)
            found.append(self.hidden[self.inputs.wanted[: len(wanted)]])
        return torch.cat(found) if len(found) > 1 else found[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes that passes are padded to, those that are worth it."""
        return self._pass.sizes

    def padded(self, num_tokens: int) -> int:
        """Return how many tokens a pass of so many really has."""
        return self._pass.padded(num_tokens)

    def run(self, num_tokens: int) -> None:
        """Pass the first `num_tokens` of `inputs` through the layers, into `hidden`."""
        self._pass(self.padded(num_tokens))

    def wait(self) -> None:
        """Wait for what was launched, where nothing is read: or the pass would seem to be free."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [n, vocab_size] of hidden states [n, hidden size]."""
        logits: Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits.float()

    def _run(self, num_tokens: int) -> None:
        self.hidden[:num_tokens] = self._forward(num_tokens).last_hidden_state[0]

    def _forward(self, num_tokens: int) -> Any:
        kv = self._kv
        kv.layout = self.inputs.layout(num_tokens, kv.block_size, kv.unused_block)
        return self._body(
            input_ids=self.inputs.token_ids[None, :num_tokens],
            position_ids=kv.layout.positions[None].clamp(min=0),
            use_cache=False,
            paged_kv=kv,
        )


class _Given(nn.Module):
    """Stands in for a model's body: its hidden states are those it is given.

    Attributes:
        kind: of the body's own output, whose fields the model may ask for.
    """

    kind: type

    def forward(self, input_ids: None = None, *, inputs_embeds: Tensor, **_: Any) -> Any:
        return self.kind(last_hidden_state=inputs_embeds)


def _split(model: Any) -> tuple[Any, _Given, Any]:
    """Take a model apart: what makes hidden states, and what makes logits of them.

    The latter is the model itself without its body, so scales and soft caps of its own remain.
    """
    body, given = model.base_model, _Given()
    setattr(model, model.base_model_prefix, given)
    return body, given, model


def _load(checkpoint: Path, dtype: torch.dtype) -> Any:
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation=NAME, local_files_only=True
    )
    if not model._supports_attention_backend:
        raise ValueError(
            f"{type(model).__name__} has an attention of its own: the torch engine needs one that "
            "goes through transformers' attention interface"
        )
    rope = _rope_types(getattr(model.config, "rope_parameters", None) or {})
    if rope & UNSUPPORTED_ROPE:
        raise ValueError(f"rope_type is {', '.join(rope)}: the torch engine needs another")
    return model.eval().requires_grad_(False)


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """Collect the kinds of rotary embedding; some models have one for each kind of layer."""
    if "rope_type" in parameters:
        return {parameters["rope_type"]}
    return {kind for value in parameters.values() if value for kind in _rope_types(value)}


def _num_kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _compile_layers(body: Any, compiler: str) -> None:
    """Compile each layer by itself: they share their code, so it is compiled once."""
    for module in body.modules():
        if type(module).__name__ in (body._no_split_modules or ()):
            module.compile(dynamic=True, backend=compiler)
