"""The CPU benchmark: the original's procedure and ours give one loss, and the table names both."""

import pytest
import torch

from benchmarks import cpu_step
from benchmarks.gpu.model import build
from benchmarks.original import padded


def test_tiny(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        cpu_step.main(["--size", "tiny", "--repeat", "1"])
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "| the original's procedure | " in out and "| ours, from features | " in out


def test_products() -> None:
    """Fewer operations than the original's padded rows and logits of all rows take, and as many for images."""
    model = build(cpu_step.configuration("tiny"), torch.float32, torch.device("cpu")).train()
    rows = cpu_step.products(model, cpu_step.BATCHES["short"])[2:]
    (vision, whole), (same, ours) = ([float(row.split(" | ")[i]) for i in (1, 3)] for row in rows)
    assert vision == same and 0 < ours < whole


def test_gradients_are_the_original_procedures() -> None:
    model = build(cpu_step.configuration("tiny"), torch.float32, torch.device("cpu")).train()
    batch = cpu_step.batch_of(model, "pixels")
    inputs = padded(batch, model.normalize)
    found = []
    for loss in (lambda: cpu_step.our_loss(model, batch), lambda: cpu_step.original_loss(model, inputs)):
        cpu_step.one_step(model, loss)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-5, msg=name)
