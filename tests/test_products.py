"""Fast float32 products are float32 products, and nobody else's setting is touched."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from tda import products


@pytest.fixture
def faster(monkeypatch):
    """As on a machine where oneDNN's products are faster."""
    monkeypatch.setattr(products, "_are_faster", lambda: True)


def test_a_product_is_as_exact_as_float32():
    left, right = torch.randn(300, 200), torch.randn(200, 100)
    with products.fast_products():
        found = left @ right
    exact = left.double() @ right.double()
    assert (found - exact).norm() < 1e-6 * exact.norm()


def test_the_setting_holds_while_anybody_is_inside(faster):
    """One leaves while another is at work: the other's products stay what they were."""
    assert torch.get_float32_matmul_precision() == "highest"

    def inside(_: int) -> str:
        with products.fast_products():
            with products.fast_products():
                pass
            return torch.get_float32_matmul_precision()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(inside, range(50))) == {"medium"}
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_precision_that_the_user_has_chosen_stays(faster):
    torch.set_float32_matmul_precision("high")
    try:
        with products.fast_products():
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_whether_products_are_faster_is_not_asked_under_a_chosen_precision(monkeypatch):
    """The answer is kept, and would be no for good."""
    monkeypatch.setattr(products, "_are_faster", lambda: pytest.fail("asked"))
    torch.set_float32_matmul_precision("high")
    try:
        with products.fast_products():
            pass
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_failure_inside_leaves_the_setting_as_it_was(faster):
    with pytest.raises(ZeroDivisionError), products.fast_products():
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_library_that_rounds_is_not_asked(monkeypatch):
    """Products of bfloat16 in place of float32's are seen."""
    exact = torch.Tensor.__matmul__

    def rounded(left, right):
        if left.dtype == torch.float64:
            return exact(left, right)
        return exact(left.bfloat16(), right.bfloat16()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not products._is_exact()


@pytest.mark.parametrize(("causal", "masked"), [(True, False), (False, True), (False, False)])
def test_attention_taken_apart_is_attention(faster, causal, masked):
    """Values and gradients, as torch's fused kernel has them."""
    parts = [torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3)]
    mask = torch.rand(7, 7) > 0.3 if masked else None
    given = {"attn_mask": mask, "is_causal": causal, "scale": 0.3}
    wanted = F.scaled_dot_product_attention(*parts, **given)
    gradients = torch.autograd.grad(wanted.square().sum(), parts)
    with products.fast_products():
        found = products.attention(*parts, **given)
        torch.testing.assert_close(found, wanted)
        for one, other in zip(
            torch.autograd.grad(found.square().sum(), parts), gradients, strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_bfloat16_is_taken_apart_within_its_rounding(causal, scale):
    """Whatever the machine: values and gradients are as near to float64's as the fused kernel's."""
    exact = [torch.randn(2, 3, 7, 4, dtype=torch.float64) for _ in range(3)]
    ways = {
        "exact": (F.scaled_dot_product_attention, torch.float64),
        "fused": (F.scaled_dot_product_attention, torch.bfloat16),
        "apart": (products.attention, torch.bfloat16),
    }
    found = {}
    for name, (way, kind) in ways.items():
        parts = [x.bfloat16().to(kind).requires_grad_() for x in exact]
        out = way(*parts, is_causal=causal, scale=scale)
        grads = torch.autograd.grad(out.square().sum(), parts)
        found[name] = torch.stack([out, *grads]).double()
    assert not torch.equal(found["apart"], found["fused"])
    errors = {name: (found[name] - found["exact"]).norm() for name in ("fused", "apart")}
    assert errors["apart"] < 2 * errors["fused"]
    assert errors["apart"] < 0.02 * found["exact"].norm()
