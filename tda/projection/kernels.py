"""The count sketch of a tile on a GPU, in one launch that reads the gradient once (Triton).

Each program takes a few examples, a few runs of ``dim`` coordinates and a block of the buckets. Its
sums are written, and added up by torch: there is no atomic addition, so that the same gradients
have the same sketch each time. Triton comes with torch where torch comes for GPUs: nobody else
imports this file.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_EXAMPLES, _BUCKETS, _RUNS = 4, 128, 32  # of one program


@triton.jit
def _add_runs(
    values, signs, shifts, sums, squares,
    num_examples, size, inside, dim, num_runs, stride,
    EXAMPLES: tl.constexpr, BUCKETS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    part, block, some = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    example = some * EXAMPLES + tl.arange(0, EXAMPLES)
    bucket = block * BUCKETS + tl.arange(0, BUCKETS)
    row = example.to(tl.int64)[:, None] * stride
    is_example, is_bucket = example < num_examples, bucket < dim
    sketch = tl.zeros((EXAMPLES, BUCKETS), tl.float32)
    square = tl.zeros((EXAMPLES, BUCKETS), tl.float32)
    for run in range(part * RUNS, min(part * RUNS + RUNS, num_runs)):
        place = bucket - tl.load(shifts + run)  # of the run, from which this bucket takes
        place += tl.where(place < 0, dim, 0)
        place += run * dim - inside  # of the tile
        is_there = is_bucket & (place >= 0) & (place < size)
        sign = tl.load(signs + place, mask=is_there, other=0).to(tl.float32)
        mask = is_example[:, None] & is_there[None, :]
        value = tl.load(values + row + place[None, :], mask=mask, other=0).to(tl.float32)
        sketch += value * sign[None, :]
        square += value * value
    out = (part * num_examples + example[:, None]).to(tl.int64) * dim + bucket[None, :]
    tl.store(sums + out, sketch, mask=is_example[:, None] & is_bucket[None, :])
    here = (part * tl.num_programs(1) + block) * num_examples + example
    tl.store(squares + here, tl.sum(square, 1), mask=is_example)


def add_runs(
    values: Tensor, signs: Tensor, shifts: Tensor, inside: int, dim: int
) -> tuple[Tensor, Tensor]:
    """Σ over runs of a tile's signed coordinates, each run turned by its shift; and ‖v‖².

    values ``[example, coordinate]``, signs ``[coordinate]`` int8, shifts ``[run]`` int32 in
    [0, dim); the tile begins ``inside`` its first run. ``[example, dim]``, ``[example]`` float32.
    """
    values = values if values.stride(1) == 1 else values.contiguous()
    count, size = values.shape
    num_runs = -(-(inside + size) // dim)
    grid = triton.cdiv(num_runs, _RUNS), triton.cdiv(dim, _BUCKETS), triton.cdiv(count, _EXAMPLES)
    sums = torch.empty(grid[0], count, dim, device=values.device)
    squares = torch.empty(grid[0] * grid[1], count, device=values.device)
    with torch.cuda.device(values.device):
        _add_runs[grid](
            values, signs, shifts, sums, squares, count, size, inside, dim, num_runs,
            values.stride(0), EXAMPLES=_EXAMPLES, BUCKETS=_BUCKETS, RUNS=_RUNS,
        )  # fmt: skip
    return sums.sum(0), squares.sum(0)
