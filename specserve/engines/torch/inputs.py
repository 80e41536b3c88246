"""What a pass reads beside weights and KV: small tensors that never move, filled from a batch.

CUDA graphs read them where they are, and the draft loop writes its next tokens there itself. Must
not know the model.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specserve.engines.paged_model import FlatBatch
from specserve.engines.torch.transfer import send


class Layout(NamedTuple):
    """Where the tokens of a pass stand, for attention.

    Attributes:
        positions: [n]; -1 marks a token that takes no part.
        rows: [n], each token's row of `tables`.
        groups: [n + 1]; the tokens [groups[i], groups[i + 1]) are neighbours in one row and may
            share what they read. The groups left over are empty.
        tables: [max_tokens, width], block ids.
        slots: [n], where each token's KV goes, counted over all blocks.
    """

    positions: Tensor
    rows: Tensor
    groups: Tensor
    tables: Tensor
    slots: Tensor


class Inputs:
    """The tensors, all int32.

    Attributes:
        token_ids, positions, rows, wanted, groups: [max_tokens + 1], the last entry for `groups`
            only; `wanted` are the tokens whose hidden state is asked for.
        tables: [max_tokens, table_width]; a batch has at most one row per token.
    """

    def __init__(self, max_tokens: int, table_width: int, device: torch.device) -> None:
        self.max_tokens = max_tokens
        self._device = device
        self._columns = torch.zeros((5, max_tokens + 1), dtype=torch.int32, device=device)
        self.token_ids, self.positions, self.rows, self.wanted, self.groups = self._columns
        self.tables = torch.zeros((max_tokens, table_width), dtype=torch.int32, device=device)
        self.positions.fill_(-1)

    def load_tables(self, batch: FlatBatch) -> None:
        """Take over the block tables of all rows.

        Raises:
            ValueError: more rows or longer tables than there is room for.
        """
        lengths = np.diff(batch.block_begins)
        max_rows, width = self.tables.shape
        if len(lengths) > max_rows or lengths.max() > width:
            raise ValueError(
                f"{len(lengths)} rows, block tables of up to {lengths.max()}: there is room for "
                f"{max_rows} rows and tables of {width}; raise scheduler.max_num_batched_tokens "
                "or serve shorter sequences"
            )
        tables = np.zeros((len(lengths), width), dtype=np.int32)
        row = np.repeat(np.arange(len(lengths)), lengths)
        tables[row, np.arange(len(row)) - batch.block_begins[row]] = batch.block_ids
        self.tables[: len(lengths)].copy_(send(tables, self._device), non_blocking=True)

    def load_tokens(
        self,
        batch: FlatBatch,
        begin: int,
        end: int,
        *,
        num_padded: int,
        group_size: int,
        wanted: NDArray[np.int64],
    ) -> None:
        """Take over tokens [begin, end) of a batch, and padding up to `num_padded` of them.

        Args:
            group_size: queries of a group, at most.
            wanted: counted from `begin`.
        """
        row = np.repeat(np.arange(len(batch.starts)), np.diff(batch.begins))[begin:end]
        offset = batch.positions[begin:end] - batch.starts[row]
        begins_group = offset % group_size == 0
        begins_group[0] = True
        groups = np.flatnonzero(begins_group)
        columns = np.zeros((5, num_padded + 1), dtype=np.int32)
        columns[1], columns[4] = -1, end - begin  # what padding gets
        for column, values in zip(
            columns,
            (batch.token_ids[begin:end], batch.positions[begin:end], row, wanted, groups),
            strict=True,
        ):
            column[: len(values)] = values
        self._columns[:, : num_padded + 1].copy_(send(columns, self._device), non_blocking=True)

    def continue_rows(self, token_ids: Tensor, positions: Tensor) -> None:
        """Give each row of the tables one next token, on the device.

        Args:
            token_ids: [n].
            positions: [n]; -1 for a row that has stopped.
        """
        num_rows = len(token_ids)
        every = torch.arange(num_rows + 1, dtype=torch.int32, device=token_ids.device)
        self.token_ids[:num_rows] = token_ids
        self.positions[:num_rows] = positions
        self.rows[:num_rows] = every[:-1]
        self.groups[: num_rows + 1] = every

    def layout(self, num_tokens: int, block_size: int, unused_block: int) -> Layout:
        """Return what attention reads in a pass of so many tokens.

        Args:
            unused_block: where tokens that take no part write.
        """
        positions, rows = self.positions[:num_tokens], self.rows[:num_tokens]
        position = positions.clamp(min=0)
        block = self.tables.view(-1)[rows * self.tables.shape[1] + position // block_size]
        block = torch.where(positions < 0, unused_block, block).long()
        slots = block * block_size + position % block_size
        return Layout(positions, rows, self.groups[: num_tokens + 1], self.tables, slots)
