"""The place where transformers' attention meets a paged KV cache.

A model loaded with `attn_implementation=NAME` hands each layer's query, key and value to
`paged_attention`, which writes the new KV into its slots and attends through the block tables.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from specserve.engines.torch.inputs import Layout

NAME = "specserve_paged"
UNSUPPORTED = ("s_aux", "position_bias")  # attention sinks, learned biases

# (query [n, heads, dim], keys, values [blocks, block size, kv heads, dim], layout, scale, sliding
# window, soft cap) -> [n, heads, dim]. Each query sees its row's tokens up to its own position.
Attend = Callable[[Tensor, Tensor, Tensor, Layout, float, int | None, float | None], Tensor]


class PagedKV:
    """One model's KV cache, and the layout of the pass that runs.

    Layers get their memory when they first write, so their number and shape is the model's own.

    Attributes:
        unused_block: one more than the block manager's; padding writes there.
    """

    def __init__(self, num_blocks: int, block_size: int, attend: Attend) -> None:
        self.block_size = block_size
        self.unused_block = num_blocks
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.layout: Layout | None = None
        self._attend = attend

    def run(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Write key and value [n, kv heads, dim], then attend."""
        assert self.layout is not None, "no pass has begun"
        if layer not in self.layers:
            self.layers[layer] = (self._allocate(key), self._allocate(value))
        keys, values = self.layers[layer]
        keys.flatten(0, 1).index_copy_(0, self.layout.slots, key)
        values.flatten(0, 1).index_copy_(0, self.layout.slots, value)
        return self._attend(query, keys, values, self.layout, scale, window, softcap)

    def _allocate(self, like: Tensor) -> Tensor:
        shape = (self.unused_block + 1, self.block_size, *like.shape[1:])
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


@torch.compiler.disable
def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    paged_kv: PagedKV | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend for transformers: [1, heads, n, dim] in, [1, n, heads, dim] out.

    Raises:
        ValueError: the model needs something that is not done here.
    """
    missing = [name for name in UNSUPPORTED if others.get(name) is not None]
    if paged_kv is None or missing:
        reason = f"uses {missing[0]}" if missing else "keeps arguments from its attention"
        raise ValueError(f"{type(module).__name__} {reason}, which the torch engine cannot do")
    flat = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = paged_kv.run(module.layer_idx, *flat, scaling, sliding_window, softcap)  # type: ignore
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, paged_attention)


def attend_plainly(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend group by group, from the definition: the reference, and the way on a CPU."""
    out = torch.zeros_like(query)
    num_kv_heads = keys.shape[2]
    for begin, end in pairwise(layout.groups.tolist()):
        position = layout.positions[begin:end]
        if begin == end or position[-1] < 0:
            continue
        length = int(position[-1]) + 1
        blocks = layout.tables[layout.rows[begin]][: -(-length // keys.shape[1])]
        k, v = (cache[blocks].flatten(0, 1)[:length] for cache in (keys, values))
        q = query[begin:end].unflatten(1, (num_kv_heads, -1))
        score = torch.einsum("qkgd,skd->kgqs", q, k).float() * scale
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        seen = torch.arange(length)
        is_seen = seen <= position[:, None]
        if window is not None:
            is_seen &= seen > position[:, None] - window
        share = score.masked_fill(~is_seen, float("-inf")).softmax(-1).to(v.dtype)
        out[begin:end] = torch.einsum("kgqs,skd->qkgd", share, v).flatten(1, 2)
    return out
