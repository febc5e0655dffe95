"""What a table holds of its examples at the last checkpoint, whole in memory."""

from __future__ import annotations

import torch

from tda.curvature import row_ranges
from tda.store import Table


def embeddings(table: Table) -> torch.Tensor:
    """The last hidden layer ``[example, hidden]`` float32. Raises StoreError if there is none."""
    table.require_complete()
    last = table.num_checkpoints - 1
    return torch.cat([table.embedding(last, *span) for span in row_ranges(table)])


def gradients(table: Table) -> torch.Tensor:
    """The rows P∇f ``[example, proj]`` float32. Raises StoreError if one is missing."""
    table.require_complete()
    last = table.num_checkpoints - 1
    return torch.cat([table.rows(last, *span) for span in row_ranges(table)])
