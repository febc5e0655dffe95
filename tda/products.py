"""Float32 matrix products by the library that has this machine's instructions.

torch multiplies float32 matrices with MKL, which on processors of AMD leaves out AVX-512: a Zen 5
reaches 100 GFLOP/s of its 230. oneDNN does not. torch gives it the product where the precision is
"medium"; that allows it to round to bfloat16, and where it would, it is not asked. torch's fused
attention has products of its own, at MKL's speed, in bfloat16 a tenth of what processors have for
it: that of short texts is taken apart.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_ZEN_5 = 26  # the family of the first processors of AMD whose AVX-512 is as wide as its name
_ROUNDING = 2e-6  # of a float32 product, at most: bfloat16's would be 1e-3

_WEIGHTS = 2**22  # of attention, that a cache holds: with more of them the fused kernel is faster

_lock = threading.Lock()
_inside = 0  # how many are within `fast_products` at this moment


@contextmanager
def fast_products() -> Iterator[None]:
    """Float32 products of the processor are as fast as it can, and as exact as before, in here."""
    entered = (_inside > 0 or _is_default()) and _are_faster() and _enter()
    try:
        yield
    finally:
        if entered:
            _leave()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's ``scaled_dot_product_attention``, by the faster of its ways."""
    weights = query.shape[:-1].numel() * key.shape[-2]
    apart = (_inside or query.dtype == torch.bfloat16) and query.device.type == "cpu"
    if not apart or weights > _WEIGHTS:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is None and not dropout_p and not enable_gqa:
        return _attention(query, key, value, is_causal, scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None
) -> Tensor:
    """softmax(scale · Q Kᵀ) V; causal: a position sees those up to itself."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.mT
    if is_causal:
        scores = scores + scores.new_full(scores.shape[-2:], -torch.inf).triu(1)
    return scores.softmax(-1) @ value


def _enter() -> bool:
    """Whether it is so now; not where the user has chosen a precision."""
    global _inside
    with _lock:
        if _inside == 0:
            if not _is_default():
                return False
            torch.set_float32_matmul_precision("medium")
        _inside += 1
        return True


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0:
            torch.set_float32_matmul_precision("highest")


def _is_default() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # chosen library by library
        return False


@cache
def _are_faster() -> bool:
    """Whether oneDNN's products are faster here and exact: the same answer in every process.

    Not where there is a GPU, whose products the same setting would round.
    """
    if torch.cuda.is_available() or not torch.backends.mkldnn.is_available():
        return False
    return _is_zen_5() and _is_exact()


def _is_zen_5() -> bool:
    try:
        about = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return False
    known = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in about.splitlines())
    }
    return (
        known.get("vendor_id") == "AuthenticAMD"
        and int(known.get("cpu family", 0)) >= _ZEN_5
        and "avx512f" in known.get("flags", "").split()
    )


def _is_exact() -> bool:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    wanted = left.double() @ right.double()
    if not _enter():
        return False
    try:
        found = left @ right
    finally:
        _leave()
    return bool((found - wanted).norm() <= _ROUNDING * wanted.norm())
