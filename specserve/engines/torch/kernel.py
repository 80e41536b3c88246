"""Paged attention for GPUs, in the Triton language: flat queries, block tables, grouped heads.

One kernel serves prompts, chunks, drafts and single tokens, and nothing in its launch depends on
how long a context is, so a captured CUDA graph stays right for every batch of its size. PyTorch's
own kernels do not offer that: variable-length attention reads block tables only with FlashAttention
3 beside it, and FlexAttention compiles anew for each shape.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specserve.engines.torch.inputs import Layout

LANES = 16  # rows of a tensor-core tile: queries times the heads that share a KV head
TILE = 64  # context tokens of an iteration
MAX_SPLITS = 16


def queries_per_program(num_heads_per_kv_head: int) -> int:
    """Return how many neighbouring queries of a row share a program, and so each read of KV."""
    return max(1, LANES // num_heads_per_kv_head)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend to everything up to each query's own position. See `Attend`."""
    query = query.contiguous()
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[2]
    num_splits = _num_splits(num_tokens * num_kv_heads, query.device)
    out = torch.empty_like(query)
    partial = out if num_splits == 1 else query.new_empty(
        (num_tokens, num_heads, num_splits, head_dim), dtype=torch.float32
    )  # fmt: skip
    weight = query.new_empty((num_tokens, num_heads, num_splits), dtype=torch.float32)
    group = num_heads // num_kv_heads
    _attend[(num_tokens, num_kv_heads, num_splits)](
        partial, weight, query, keys, values,
        layout.positions, layout.rows, layout.groups, layout.tables,
        scale, softcap or 0.0, window or 0, layout.tables.stride(0),
        BLOCK_SIZE=keys.shape[1], NUM_KV_HEADS=num_kv_heads, GROUP=group,
        LANES=max(LANES, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim, DIM=max(16, triton.next_power_of_2(head_dim)),
        TILE=TILE, NUM_SPLITS=num_splits,
        HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None,
    )  # fmt: skip
    if num_splits > 1:
        _merge[(num_tokens * num_heads,)](
            out, partial, weight,
            HEAD_DIM=head_dim, DIM=triton.next_power_of_2(head_dim), NUM_SPLITS=num_splits,
        )  # fmt: skip
    return out


def _num_splits(num_programs: int, device: torch.device) -> int:
    """Cut contexts into enough pieces to keep the whole device busy with few queries."""
    num_processors = 1
    if device.type == "cuda":
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = 2 * num_processors // num_programs
    return min(MAX_SPLITS, triton.next_power_of_2(wanted)) if wanted > 1 else 1


@triton.jit
def _attend(
    out, weight,  # [tokens, heads, splits, dim] and [tokens, heads, splits]
    query,  # [tokens, heads, dim]
    keys, values,  # [blocks, BLOCK_SIZE, kv heads, dim]
    positions, rows, groups, tables,  # see Layout
    scale, softcap, window, table_stride,
    BLOCK_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    LANES: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    TILE: tl.constexpr, NUM_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One group of queries x one KV head x one piece of the context: an online softmax.

    Milakov and Gimelshein 2018 (arXiv 1805.02867); pieces are merged by their log-sum-exp.
    """
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    begin = tl.load(groups + tl.program_id(0))
    end = tl.load(groups + tl.program_id(0) + 1)
    if begin == end:
        return

    lane = tl.arange(0, LANES)
    token = begin + lane // GROUP
    is_query = token < end
    position = tl.load(positions + token, mask=is_query, other=-1)
    last = tl.max(position, axis=0)
    dim = tl.arange(0, DIM)
    head = token.to(tl.int64) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + lane % GROUP
    q = tl.load(
        query + head[:, None] * HEAD_DIM + dim[None, :],
        mask=is_query[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )

    first_tile = 0
    if HAS_WINDOW:
        first_tile = tl.maximum(tl.load(positions + begin) - window + 1, 0) // TILE
    num_tiles = tl.cdiv(last + 1, TILE) - first_tile
    tiles_per_split = tl.cdiv(num_tiles, NUM_SPLITS)
    low = first_tile + split * tiles_per_split
    high = first_tile + tl.minimum((split + 1) * tiles_per_split, num_tiles)

    best = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    mean = tl.zeros([LANES, DIM], tl.float32)
    table = tables + tl.load(rows + begin) * table_stride
    for tile in range(low, high):
        slot = tile * TILE + tl.arange(0, TILE)
        is_read = slot <= last
        block = tl.load(table + slot // BLOCK_SIZE, mask=is_read, other=0).to(tl.int64)
        at = ((block * BLOCK_SIZE + slot % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
        offsets = at[:, None] + dim[None, :]
        mask = is_read[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(keys + offsets, mask=mask, other=0.0)
        v = tl.load(values + offsets, mask=mask, other=0.0)

        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)  # tanh
        is_seen = slot[None, :] <= position[:, None]
        if HAS_WINDOW:
            is_seen = is_seen & (slot[None, :] > position[:, None] - window)
        score = tl.where(is_seen, score, float("-inf"))

        new_best = tl.maximum(best, tl.max(score, axis=1))
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)  # a lane may see nothing yet
        p = tl.exp(score - shift[:, None])
        keep = tl.exp(best - shift)
        total = total * keep + tl.sum(p, axis=1)
        mean = mean * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        best = new_best

    mean = mean / tl.where(total == 0.0, 1.0, total)[:, None]
    to = head * NUM_SPLITS + split
    tl.store(
        out + to[:, None] * HEAD_DIM + dim[None, :],
        mean.to(out.dtype.element_ty),
        mask=is_query[:, None] & (dim < HEAD_DIM)[None, :],
    )
    if NUM_SPLITS > 1:
        tl.store(weight + to, best + tl.log(total), mask=is_query)


@triton.jit
def _merge(
    out, partial, weight,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """Weigh the pieces of one query and head by their share of the softmax's sum."""
    at = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, NUM_SPLITS)
    dim = tl.arange(0, DIM)
    log_sum = tl.load(weight + at * NUM_SPLITS + split)
    share = tl.exp(log_sum - tl.maximum(tl.max(log_sum, axis=0), -1e30))
    share = share / tl.maximum(tl.sum(share, axis=0), 1e-30)
    pieces = tl.load(
        partial + (at * NUM_SPLITS + split)[:, None] * HEAD_DIM + dim[None, :],
        mask=(dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    mean = tl.sum(share[:, None] * pieces, axis=0)
    tl.store(out + at * HEAD_DIM + dim, mean.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
