"""The ledger: a step of the current code has the kernels, bytes and operations of the committed table."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fake_gpu import DEVICE, backward, fake_gpu
from benchmarks.gpu.plan import Case
from benchmarks.operations.fusion import Kernels, compiled, uncompiled
from benchmarks.operations.record import Recorder
from benchmarks.operations.table import CASES, REGENERATE, changes, count, markdown, name_of, read, versions

# Every stage, source and number of samples; those left out have the operations of these at other sizes.
COUNTED = [CASES[number] for number in (0, 1, 2, 5)]
counted = functools.cache(count)


@pytest.fixture
def committed() -> dict[str, Any]:
    table = read()
    if versions() != table["versions"]:
        pytest.skip(f"the table was made with {table['versions']}, here there is {versions()}")
    return table


@pytest.mark.parametrize("case", COUNTED, ids=name_of)
def test_a_step_is_as_in_the_table(case: Case, committed: dict[str, Any]) -> None:
    different = changes(case, counted(case), committed)
    assert not different, "\n".join([*different, f"If this is meant: {REGENERATE}, and benchmarks/README.md"])


def test_a_change_is_seen(committed: dict[str, Any]) -> None:
    """One kernel more, or 2 % more bytes."""
    case = COUNTED[-1]
    parts = committed["cases"][name_of(case)]["uncompiled"]
    parts["phi"][0] += 1
    parts["head and loss"][1] *= 1.02
    (head, phi) = changes(case, counted(case), committed)
    assert "phi" in phi and "head and loss" in head and "in the table" in head


def test_goals() -> None:
    """With compiled blocks, stage 1 moves at most 150 GB in at most 1,700 kernels; stage 4 has at most 2,000."""
    compiled_blocks = {name: ways["compiled blocks"]["all"] for name, ways in read()["cases"].items()}
    kernels, megabytes, _ = compiled_blocks["stage 1, 64 samples, pixels"]
    assert kernels <= 1700 and megabytes <= 150e3
    assert all(kernels <= 2000 for kernels, *_ in compiled_blocks.values())


def test_the_readme_has_the_table() -> None:
    from tinygptv_ds.resources import project_root

    text = (project_root() / "benchmarks/README.md").read_text(encoding="utf-8")
    missing = [line for line in markdown(read()) if line not in text]
    assert not missing, f"benchmarks/README.md has another table; {REGENERATE} prints it"


def block(x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """A norm, a product, and two pointwise operations, of which one needs nothing of the product."""
    h = torch.nn.functional.layer_norm(x.float(), x.shape[-1:]).to(x.dtype)
    return x + (h @ weight) * gate.sigmoid()


@pytest.fixture
def recorded() -> Recorder:
    rows, width = 1000, 64
    with fake_gpu():
        x, gate = (torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        weight = torch.empty(width, width, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        with Recorder() as recorder:
            with recorder.part("forward"), recorder.block():
                out = block(x, weight, gate)
            backward(out.sum(), recorder.backward_of)
    return recorder


def test_the_rule_of_fusion(recorded: Recorder) -> None:
    """Cast, norm and cast; the product; the gate with what follows. Backward: one kernel before the product."""
    rows, width, half = 1000, 64, 2
    one = rows * width * half
    plain, fused = uncompiled(recorded.operations), compiled(recorded.operations)
    assert plain["forward"].kernels == 7 and fused["forward"].kernels == 3
    product = 2.0 * rows * width * width
    assert plain["forward"].flops == fused["forward"].flops == product
    norm = 2 * one + 2 * rows * 4  # mean and deviation of every row, which nothing reads later, count as results
    after = 4 * one + one  # x, product and gate read, the sum and (for the backward pass) the gate's sigmoid written
    assert fused["forward"].bytes == norm + (2 * one + width * width * half) + after
    assert fused["forward, backward"].kernels == 2 and fused["forward, backward"].flops == product


def test_kernels_add_up() -> None:
    assert Kernels(1, 2, 3.0) + Kernels(1, 1, 1.0) == Kernels(2, 3, 4.0)


def test_what_is_an_operation() -> None:
    """Views, allocation and empty tensors cost nothing; rows of a table cost no more than they are."""
    with fake_gpu():
        table, ids = torch.empty(1000, 8, device=DEVICE), torch.empty(3, dtype=torch.long, device=DEVICE)
        with Recorder() as recorder:
            torch.empty(4, device=DEVICE).view(2, 2).t()
            torch.empty(0, device=DEVICE) + 1
            torch.nn.functional.embedding(ids, table)
    (row,) = recorder.operations
    assert row.name == "embedding" and row.bytes == 3 * 8 * 4 * 2 + 3 * 8
