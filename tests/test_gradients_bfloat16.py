"""In bfloat16 each product is rounded as plain autograd rounds it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import tda
from tda.gradients import Gradients


def test_bfloat16_gradients_are_those_of_a_plain_backward_pass():
    """Per example, and summed: to the rounding of one bfloat16 product."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.GELU(), torch.nn.Linear(48, 6))
    inputs, labels = torch.randn(7, 10, 64), torch.randint(0, 6, (7, 10))

    def measure(model, batch):
        logits = model(batch[0]).float()
        return F.cross_entropy(logits.mT, batch[1], reduction="none").sum(1)

    found = {}

    def keep(name, factors):
        found[name] = factors[0].rows(0, factors[0].shape[0]), factors[0].square_norm()

    gradients = Gradients(
        model, tda.Task(model, measurement=measure).measurement, "cpu", torch.bfloat16
    )
    gradients((inputs, labels), 7, keep)
    for example in range(7):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = measure(model, (inputs[example, None], labels[example, None]))
        output.sum().backward()
        for name in ("0.weight", "2.weight"):
            plain = model.get_parameter(name).grad
            torch.testing.assert_close(
                found[name][0][example], plain, rtol=2**-6, atol=2**-7 * float(plain.abs().max())
            )
            norm = found[name][1]
            if norm is not None:
                torch.testing.assert_close(norm[example].sqrt(), plain.norm(), rtol=0.01, atol=0)
