"""The cuts that ZeRO makes through parameters are undone for any shapes and number of ranks."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.layouts.deepspeed_checkpoint import open_deepspeed, step_folder

SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4)
GROUPS = st.lists(SHAPES, min_size=1, max_size=3)


def parameters(groups: list[list[tuple[int, ...]]]) -> list[dict[str, Tensor]]:
    """Every value different, so that any wrong cut shows."""
    first, made = 0.0, []
    for g, shapes in enumerate(groups):
        made.append({})
        for i, shape in enumerate(shapes):
            count = torch.Size(shape).numel()
            made[-1][f"group{g}.weight{i}"] = torch.arange(first, first + count).reshape(shape)
            first += count
    return made


def padded(row: Tensor, multiple: int) -> Tensor:
    return torch.cat([row, row.new_full((-len(row) % multiple,), -1.0)])


def zero2(groups: list[dict[str, Tensor]], ranks: int) -> list[dict]:
    """A group's parameters in one row, filled up, one slice a rank (deepspeed/runtime/zero/stage_1_and_2.py)."""
    rows = [padded(torch.cat([t.flatten() for t in group.values()]), 2 * ranks).chunk(ranks) for group in groups]
    key = "single_partition_of_fp32_groups"
    return [{key: [row[r] for row in rows], "partition_count": [ranks] * len(groups)} for r in range(ranks)]


def zero3(groups: list[dict[str, Tensor]], ranks: int) -> list[dict]:
    """Each parameter filled up and cut, the rank's shares of a group in one row (deepspeed/runtime/zero/stage3.py)."""
    return [
        {
            "fp32_flat_groups": [
                torch.cat([padded(t.flatten(), ranks).chunk(ranks)[rank] for t in group.values()]) for group in groups
            ],
            "partition_count": ranks,
        }
        for rank in range(ranks)
    ]


def write(folder: Path, groups: list[dict[str, Tensor]], stage: int, ranks: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for rank, state in enumerate((zero3 if stage == 3 else zero2)(groups, ranks)):
        file = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": {**state, "zero_stage": stage}}, file)
    shapes = [{name: tensor.shape for name, tensor in group.items()} for group in groups]
    torch.save({"param_shapes": shapes, "global_steps": 7}, folder / "mp_rank_00_model_states.pt")
    return folder


@settings(deadline=None, max_examples=60)
@given(groups=GROUPS, stage=st.sampled_from([1, 2, 3]), ranks=st.integers(1, 12))
def test_any_shapes_and_ranks(tmp_path_factory, groups: list, stage: int, ranks: int) -> None:
    """Twelve ranks: the files' order by name is not that of the ranks."""
    made = parameters(groups)
    found = open_deepspeed(write(tmp_path_factory.mktemp("zero"), made, stage, ranks))
    assert (found.zero_stage, found.ranks, found.step) == (stage, ranks, 7)
    together = {name: tensor for group in made for name, tensor in group.items()}
    assert list(found.weights) == list(together)
    for name, stored in found.weights.items():
        assert stored.shape == tuple(together[name].shape)
        assert torch.equal(stored.read(), together[name]), name


def test_the_step_that_latest_names(tmp_path: Path) -> None:
    made = parameters([[(2, 3)]])
    step = write(tmp_path / "global_step7", made, 2, 1)
    assert step_folder(tmp_path) is None
    (tmp_path / "latest").write_text("global_step7\n")
    assert step_folder(tmp_path) == step_folder(step) == step
    for wrong in ("global_step8", "../elsewhere", "/etc"):
        (tmp_path / "latest").write_text(wrong)
        with pytest.raises(WeightsError, match=r"names .*, where there is no"):
            step_folder(tmp_path)


def test_other_objects_are_not_unpickled(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "canary"),)

    folder = write(tmp_path / "step", parameters([[(2, 3)]]), 2, 1)
    torch.save({"optimizer_state_dict": Malicious()}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(WeightsError, match="not opened because unpickling could run code"):
        open_deepspeed(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "mp_rank_00_model_states.pt").unlink(), "are both needed"),
        (lambda f: torch.save({}, f / "zero_pp_rank_0_mp_rank_00_optim_states.pt"), "holds no ZeRO state"),
        (
            lambda f: torch.save({"param_shapes": [{"a": (99,)}]}, f / "mp_rank_00_model_states.pt"),
            "not in the layout of DeepSpeed",
        ),
        (lambda f: torch.save({"mp_world_size": 2}, f / "mp_rank_00_model_states.pt"), "tensor parallelism"),
        (lambda f: (f / "mp_rank_00_model_states.pt").write_bytes(b"PK"), "damaged"),
    ],
    ids=["no names", "no state", "other shapes", "tensor parallel", "cut short"],
)
def test_what_is_not_right_is_refused(tmp_path: Path, spoil, message: str) -> None:
    folder = write(tmp_path / "step", parameters([[(2, 3)]]), 2, 1)
    spoil(folder)
    with pytest.raises(WeightsError, match=message):
        open_deepspeed(folder)


@pytest.mark.parametrize("stage", [2, 3])
def test_stages_as_older_pythons_pickle_them(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Python 3.11.4 an Enum's member is getattr(Enum, name); its name gives the stage."""
    path = "deepspeed.runtime.zero.config"
    enum = type("ZeroStageEnum", (), {"__module__": path})
    for depth in range(1, 5):
        monkeypatch.setitem(sys.modules, ".".join(path.split(".")[:depth]), SimpleNamespace(ZeroStageEnum=enum))

    class Member:
        def __reduce__(self) -> tuple:
            return getattr, (enum, {2: "gradients", 3: "weights"}[stage])

    groups = parameters([[(3, 2)]])
    write(tmp_path, groups, stage, 2)
    for file in tmp_path.glob("*_optim_states.pt"):
        content = torch.load(file, weights_only=True)
        content["optimizer_state_dict"]["zero_stage"] = Member()
        torch.save(content, file)
    opened = open_deepspeed(tmp_path)
    assert opened.zero_stage == stage
    assert torch.equal(opened.weights["group0.weight0"].read(), groups[0]["group0.weight0"])
