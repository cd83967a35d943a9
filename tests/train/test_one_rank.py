"""A single rank under ZeRO-1 and 2: the numbers of ZeRO's optimizer, a fraction of its operations, one wait a step."""

import collections
import math
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import one_rank, tiny
from helpers.forked import apart, ended
from torch.utils._python_dispatch import TorchDispatchMode

from tinygptv_ds.models.launches import optimizer_kernels
from tinygptv_ds.train import engine as engine_module
from tinygptv_ds.train.checkpoint.resume import open_checkpoint, restore_optimizer
from tinygptv_ds.train.checkpoint.snapshot import take_snapshot
from tinygptv_ds.train.checkpoint.storage import write_checkpoint
from tinygptv_ds.train.engine import MOMENTS

# Reading a value of the device, shapes that depend on values, and values of the host that the device is to have.
WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "lift_fresh"}
FREE = {"detach", "alias", "view", "_unsafe_view", "empty", "empty_like", "new_empty"}
# Operations of a step besides the forward and the backward pass. ZeRO-2 takes over a thousand for the 261 tensors.
BOUND, BOUND_WITH_CLIPPING = 40, 60
FP16 = {"torch_autocast": {"enabled": True, "dtype": "float16", "lower_precision_safe_modules": []}}
BF16 = {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}}
STEPS = [(True,), (False,), (True, False, True), (True, True)]  # images of each micro-batch


class Count(TorchDispatchMode):
    """A counter of operations that launch something, and of those that the host would wait at."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: collections.Counter[str] = collections.Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            self.operations[name] += 1
        if name in WAITS:
            ours = [f for f in traceback.extract_stack() if "tinygptv_ds" in f.filename or "deepspeed" in f.filename]
            self.waits += [
                f"{name} at {frame.filename}:{frame.lineno}" for frame in ours[-1:]
            ]  # none in the test itself
        return func(*args, **(kwargs or {}))


def counted(lora_r: int, keep_zero: bool, settings: dict[str, Any]) -> tuple[int, int, list[str]]:
    """Return trained tensors, and operations and waits of a step besides its forward and its plain backward pass."""
    one_rank.join()
    adamw = torch.optim.AdamW  # fused, as on a GPU: the other one reads its step counts
    torch.optim.AdamW = lambda groups, **rest: adamw(groups, **{**rest, "fused": True})
    engine = one_rank.tiny_engine(keep_zero=keep_zero, layers=32, lora_r=lora_r, **settings)
    one_rank.train_step(engine, 0)
    trained = [parameter for _, parameter in engine.trained_parameters()]
    with Count() as backward:
        output = engine.module(**one_rank.inputs(1))
        torch.autograd.grad(output.token_losses.sum() + output.anchor, trained)
    with Count() as step:
        one_rank.train_step(engine, 1)
    assert engine.step_taken
    return len(trained), step.operations.total() - backward.operations.total(), step.waits


@pytest.mark.parametrize("settings", [{}, {"gradient_clipping": 0.1}, FP16], ids=["plain", "clipping", "fp16"])
@pytest.mark.parametrize(("lora_r", "tensors"), [(0, 133), (4, 261)])
def test_operations_and_waits_of_a_step(lora_r: int, tensors: int, settings: dict[str, Any]) -> None:
    found, operations, waits = apart(counted, lora_r, False, settings)
    assert found == tensors
    if settings is not FP16:  # whose casts in the forward pass are counted, too
        assert operations <= (BOUND_WITH_CLIPPING if settings else BOUND)
    assert len(waits) == 1 and "flat_optimizer.py" in waits[0]


@pytest.mark.parametrize("settings", [{}, {"gradient_clipping": 0.1}], ids=["plain", "clipping"])
def test_zero_waits_once_too(settings: dict[str, Any]) -> None:
    """With several ranks, ZeRO's own optimizer: the norm is copied to the host, where DeepSpeed looks at it."""
    _, operations, waits = apart(counted, 4, True, settings)
    assert operations > 2 * 261  # it takes two copies of each gradient; the bound above means something
    if not settings:
        assert optimizer_kernels(261, flat=False) == pytest.approx(operations, rel=0.1)
    assert not [wait for wait in waits if "lift_fresh" in wait]
    # On a CPU the copy is no operation; these read what is on the host by then.
    assert all("is_invalid" in line_of(wait) or "bool((~torch.isfinite" in line_of(wait) for wait in waits), waits


def line_of(wait: str) -> str:
    """Return the line of code at which a wait was seen."""
    file, number = wait.split(" at ")[1].rsplit(":", 1)
    return Path(file).read_text().splitlines()[int(number) - 1]


def both(zero: int, checked_by_deepspeed: bool, settings: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Train the same steps with ZeRO's optimizer and without; returns what each step differs in."""
    one_rank.join()
    if checked_by_deepspeed:
        engine_module._ask_once = lambda optimizer: None
    ours, theirs = (one_rank.tiny_engine(zero, keep_zero=keep, **settings) for keep in (False, True))
    assert ours.flat is not None and theirs.flat is None
    differences = []
    for number in range(8):
        factor = math.nan if number == 5 else 1e-3
        calls = {"images": STEPS[number % len(STEPS)], "factor": factor}
        losses = [torch.stack(one_rank.train_step(engine, number, **calls)) for engine in (ours, theirs)]
        mine, other = map(one_rank.state_of, (ours, theirs))
        differing = [name for name in mine if not torch.equal(mine[name], other[name])]
        same_losses = torch.equal(losses[0].nan_to_num(), losses[1].nan_to_num())
        taken = (ours.step_taken, theirs.step_taken, ours.loss_scale() == theirs.loss_scale())
        differences.append((differing, same_losses, ours.grad_norm() == theirs.grad_norm(), taken, factor > 0))
    assert len(mine) == 3 * len(dict(ours.trained_parameters())) + 1
    return differences


@pytest.mark.parametrize("checked_by_deepspeed", [True, False], ids=["DeepSpeed's checks", "one check"])
@pytest.mark.parametrize(
    ("zero", "settings"),
    [
        (1, {}),
        (2, {}),
        (2, {"gradient_clipping": 0.05}),
        (2, BF16),
        (2, FP16),
        (2, {**FP16, "gradient_clipping": 0.05}),
    ],
    ids=["ZeRO-1", "ZeRO-2", "clipping", "bf16", "fp16", "fp16 with clipping"],
)
def test_every_bit_is_that_of_zero(zero: int, settings: dict[str, Any], checked_by_deepspeed: bool) -> None:
    """Losses, norms, weights, moments, counts: over accumulation, without images, and where a step is not finite.

    Under autocast, LoRA's weights are cast together on our side, and one by one next to ZeRO's optimizer.
    """
    for number, (differing, losses, norms, taken, finite) in enumerate(
        apart(both, zero, checked_by_deepspeed, settings)
    ):
        assert differing == [], number
        assert losses and norms, number
        assert taken == (finite, finite, True), number


def restored() -> list[bool]:
    """Return whether an engine whose state was set to that of another goes on as that one, with and without ZeRO."""
    one_rank.join()
    going_on = [one_rank.tiny_engine(keep_zero=keep) for keep in (False, True)]
    for number in range(3):
        for engine in going_on:
            one_rank.train_step(engine, number)
    states = list(map(one_rank.state_of, going_on))
    same = []
    for keep in (False, True):
        state = states[not keep]  # of the other kind
        fresh = one_rank.tiny_engine(keep_zero=keep, weights=state)
        one_rank.train_step(fresh, 0, rate=0.0)  # AdamW has no state before a first step
        for moment in MOMENTS:
            fresh.set_moments(moment, lambda name, moment=moment, state=state: state[f"{moment}/{name}"])
        fresh.set_optimizer_steps(*state["steps"][:2].tolist())
        one_rank.train_step(fresh, 3)
        one_rank.train_step(going_on[keep], 3)
        mine, other = one_rank.state_of(fresh), one_rank.state_of(going_on[keep])
        same.append(all(torch.equal(mine[name], other[name]) for name in mine))
        fresh.reset_optimizer()
        same.append(fresh.optimizer_steps == 0 and not any(map(torch.any, fresh.moments("exp_avg").values())))
    return same


def test_a_state_of_zero_and_back() -> None:
    assert apart(restored) == [True] * 4


def resumed_before_a_step(folder: Path, zero: int, keep: bool, factor: float, targets: int) -> list[bool]:
    """Save after a step that moves nothing and resume; returns whether state, count and the next steps are right."""
    one_rank.join()
    engine = one_rank.tiny_engine(zero, keep_zero=keep, **FP16)
    engine.reset_optimizer()  # nothing to reset, either
    one_rank.train_step(engine, 0, factor=factor, targets=targets)
    snapshot = take_snapshot(engine, 1, batch_size=1, fingerprint={})
    checkpoint = open_checkpoint(write_checkpoint(folder, snapshot))
    moments = [tensor for name, tensor in snapshot.tensors.items() if not name.startswith("weight/")]
    right = [
        engine.step_taken == math.isfinite(factor),
        len(moments) == 2 * len(checkpoint.names) and not any(map(torch.any, moments)),
        snapshot.state["optimizer_steps"] == snapshot.state["image_steps"] == 0,
    ]
    weights = {f"weight/{name}": checkpoint.tensor("weight", name) for name in checkpoint.names}
    fresh = one_rank.tiny_engine(zero, keep_zero=keep, weights=weights, **FP16)
    right.append(restore_optimizer(fresh, checkpoint) == 1 and fresh.loss_scale() == engine.loss_scale())
    for number in (1, 2):
        losses = [torch.stack(one_rank.train_step(each, number)) for each in (engine, fresh)]
        right.append(torch.equal(*losses) and engine.step_taken and fresh.step_taken)
    states = [one_rank.state_of(each) for each in (engine, fresh)]
    return [*right, all(torch.equal(states[0][name], states[1][name]) for name in states[0] if name != "steps")]


@pytest.mark.parametrize(("factor", "targets"), [(math.inf, 1), (1e-3, 0)], ids=["overflow", "nothing to train on"])
@pytest.mark.parametrize(("zero", "keep"), [(2, False), (1, True), (2, True), (3, True)])
def test_a_checkpoint_before_the_first_step_taken(
    zero: int, keep: bool, factor: float, targets: int, tmp_path: Path
) -> None:
    """AdamW has no state yet: zeros are written, with a count of 0, and the resumed run goes on bit for bit."""
    assert apart(resumed_before_a_step, tmp_path, zero, keep, factor, targets) == [True] * 7


def test_the_log_and_deepspeeds_own_checkpoints(weights: Path, shards: dict[str, Path], tmp_path: Path) -> None:
    """The log says so once; DeepSpeed's own checkpoints need ZeRO's optimizer, and the numbers are the same."""
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe(weights, shards, train__steps_per_epoch=3))
    flat = ended(recipe, tmp_path / "flat")
    zero = ended(recipe, tmp_path / "zero", "--set=train.deepspeed_checkpoints=true")
    said = "one rank leaves ZeRO-2 nothing to partition"
    assert (flat.output.count(said), zero.output.count(said)) == (1, 0)
    assert flat.column("train/loss") == zero.column("train/loss")
    assert flat.column("train/grad_norm") == zero.column("train/grad_norm")
    trained = [(run.folder / "model/trained.safetensors").read_bytes() for run in (flat, zero)]
    assert trained[0] == trained[1]
