"""Checkpoints as DeepSpeed writes them (ZeRO-1 to 3, any world size): trained weights, and AdamW's moments.

Each rank's `*_optim_states.pt` holds its slices of the fp32 copies and of the moments, end to end; a
`*_model_states.pt` has names and shapes. ZeRO-1 and 2 cut the whole row of a parameter group into one slice per rank;
ZeRO-3 cuts every parameter. Only the bytes of the requested parameter are read, and DeepSpeed itself is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.io import Stored
from tinygptv_ds.weights.torch_file import open_torch

MOMENTS = ("exp_avg", "exp_avg_sq")
_CLIENT = "tinygptv_ds"  # the key of the state that runs of this program add


@dataclass(frozen=True)
class DeepSpeedCheckpoint:
    """A checkpoint of DeepSpeed, opened.

    Attributes:
        folder: the folder of the step, with the ranks' files.
        weights: trained weights by name, fp32.
        frozen: names of frozen weights in it.
        zero_stage: 1, 2 or 3.
        ranks: the world size that wrote it.
        step: optimizer steps.
        optimizers: the content of each rank's `*_optim_states.pt`.
        param_shapes: shapes by name, for each parameter group.
        client: the state that the program which wrote it has added.
    """

    folder: Path
    weights: dict[str, Stored]
    frozen: list[str]
    zero_stage: int
    ranks: int
    step: int
    optimizers: list[dict]
    param_shapes: list[dict]
    client: dict[str, Any]

    @property
    def moments(self) -> dict[str, dict[str, Stored]]:
        """AdamW's moments, fp32, by `exp_avg` or `exp_avg_sq` and then by name."""
        return {kind: _joined(self.folder, self.optimizers, self.param_shapes, kind) for kind in MOMENTS}

    @property
    def optimizer_steps(self) -> int:
        """The number of steps that AdamW has counted for its first parameter group."""
        return _steps(_adam_state(self.optimizers[0])[0])

    @property
    def image_steps(self) -> int:
        """The number of steps that it has counted for the last group; with groups as here, the steps with images."""
        return _steps(_adam_state(self.optimizers[0])[-1])


class _Inert:
    """A stand-in for DeepSpeed's own small objects in a checkpoint, of which only an Enum's number is used."""

    def __init__(self, *args: Any) -> None:
        self.args = args


# Python before 3.11.4 pickles an Enum's member as getattr(Enum, name).
_ZERO_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


def _member(_: type[_Inert], name: str) -> _Inert:
    """Replace that getattr without looking anything up."""
    return _Inert(_ZERO_STAGES[name])


_KNOWN = [
    (_member, "builtins.getattr"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def step_folder(path: Path) -> Path | None:
    """Return the folder of the ranks' files: a step's own, or the one that `latest` names; None without them."""
    if any(path.glob("*_optim_states.pt")):
        return path
    latest = path / "latest"
    if not latest.is_file():
        return None
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    if Path(name).name != name or not any((path / name).glob("*_optim_states.pt")):
        raise WeightsError(
            f"{latest} names {name!r}, where there is no *_optim_states.pt; name the folder of a step instead"
        )
    return path / name


def open_deepspeed(folder: Path) -> DeepSpeedCheckpoint:
    """Open the folder of a step.

    Raises:
        WeightsError: a rank's file is missing or damaged, or the checkpoint is not one of ZeRO.
    """
    optimizers = [_optimizer_state(file) for file in _by_rank(folder, "optim")]
    model_files = _by_rank(folder, "model")
    if not optimizers or not model_files:
        raise WeightsError(f"{folder}: *_optim_states.pt and *_model_states.pt are both needed; copy the whole folder")
    model = _content(model_files[0])
    if model.get("mp_world_size", 1) != 1:
        raise WeightsError(f"{folder} was written with tensor parallelism, which is not supported; save it without")
    stage = _number(optimizers[0]["zero_stage"])
    ranks = optimizers[0]["partition_count"]
    ranks = max(ranks) if isinstance(ranks, list) else ranks
    if ranks != len(optimizers):
        raise WeightsError(
            f"{folder}: written by {ranks} ranks, but there are {len(optimizers)} *_optim_states.pt; copy all ranks' "
            "files, from a file system that every node has written to"
        )
    shapes = model.get("param_shapes") or []
    return DeepSpeedCheckpoint(
        folder,
        _joined(folder, optimizers, shapes, None),
        list(model.get("frozen_param_shapes") or ()),
        stage,
        ranks,
        model.get("global_steps", 0),
        optimizers,
        shapes,
        model.get(_CLIENT) or {},
    )


def _by_rank(folder: Path, kind: str) -> list[Path]:
    """Return the ranks' files of one kind in the order of the ranks, which is not that of the names."""
    found = {}
    for path in folder.glob(f"*_{kind}_states.pt"):
        match = re.search(r"zero_pp_rank_(\d+)_", path.name)
        found[int(match[1]) if match else 0] = path
    return [found[rank] for rank in sorted(found)]


def _content(file: Path) -> dict:
    content = open_torch(file, _KNOWN)
    if not isinstance(content, dict):
        raise WeightsError(f"{file}: not a file of a DeepSpeed checkpoint; name the folder of a step")
    return content


def _optimizer_state(file: Path) -> dict:
    state = _content(file).get("optimizer_state_dict")
    if not isinstance(state, dict) or not {"zero_stage", "partition_count"} <= state.keys():
        raise WeightsError(f"{file}: holds no ZeRO state; only checkpoints of ZeRO-1, 2 and 3 are read")
    return state


def _number(stage: Any) -> int:
    return int(stage.args[0]) if isinstance(stage, _Inert) else int(stage)


def _joined(
    folder: Path, optimizers: Sequence[dict], param_shapes: Sequence[dict], kind: str | None
) -> dict[str, Stored]:
    """Return whole tensors by name: the fp32 copies (`kind` None) or one of the moments."""
    join = _join_zero3 if _number(optimizers[0]["zero_stage"]) == 3 else _join_zero2
    try:
        return dict(join(optimizers, param_shapes, kind))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{folder}: {kind or 'fp32 copies'} not in the layout of DeepSpeed ({error!r})") from None


def _rows(optimizer: dict, kind: str | None) -> list[Stored]:
    """Return one rank's slice of every row: fp32 copies are under ZeRO's keys, moments in torch's state dict."""
    if kind is not None:
        return [state[kind] for state in _adam_state(optimizer)]
    zero3 = _number(optimizer["zero_stage"]) == 3
    return optimizer["fp32_flat_groups" if zero3 else "single_partition_of_fp32_groups"]


def _adam_state(optimizer: dict) -> list[dict]:
    zero3 = _number(optimizer["zero_stage"]) == 3
    states = optimizer["optimizer_state_dict" if zero3 else "base_optimizer_state"]["state"]
    return [states[number] for number in sorted(states)]


def _steps(state: dict) -> int:
    return int(state["step"].read() if isinstance(state["step"], Stored) else state["step"])


def _join_zero2(
    optimizers: Sequence[dict], param_shapes: Sequence[dict], kind: str | None
) -> Iterator[tuple[str, Stored]]:
    """Join the ranks' slices: in each group, one after the other, they are the whole row."""
    paddings = optimizers[0].get("param_alignment_paddings") or [[0] * len(group) for group in param_shapes]
    rows = [_rows(state, kind) for state in optimizers]
    for number, (group, padding) in enumerate(zip(param_shapes, paddings, strict=True)):
        slices = [row[number] for row in rows]
        begin = 0
        for (name, shape), gap in zip(group.items(), padding, strict=True):
            end = begin + torch.Size(shape).numel()
            _check_end(name, end, sum(part.numel for part in slices))
            yield name, Stored(tuple(shape), torch.float32, partial(_read_row, slices, begin, end, tuple(shape)))
            begin = end + gap


def _join_zero3(
    optimizers: Sequence[dict], param_shapes: Sequence[dict], kind: str | None
) -> Iterator[tuple[str, Stored]]:
    """Join the ranks' shares: a parameter has the same place in every rank's row; the last share is padded."""
    rows = [_rows(state, kind) for state in optimizers]
    begin = 0
    for name, shape in ((name, shape) for group in param_shapes for name, shape in group.items()):
        end = begin + -(-torch.Size(shape).numel() // len(rows))
        _check_end(name, end, sum(part.numel for part in rows[0]))
        yield name, Stored(tuple(shape), torch.float32, partial(_read_shares, rows, begin, end, tuple(shape)))
        begin = end


def _check_end(name: str, end: int, available: int) -> None:
    if end > available:
        raise ValueError(f"{name} would end at {end} of {available} values")


def _read_row(slices: Sequence[Stored], begin: int, end: int, shape: tuple[int, ...]) -> Tensor:
    """Read values `begin` to `end` of tensors that follow each other."""
    bounds = torch.tensor([0, *(part.numel for part in slices)]).cumsum(0).tolist()
    pieces = []
    for part, (first, last) in zip(slices, pairwise(bounds), strict=True):
        if first < end and begin < last:
            pieces.append(part.flat(max(begin, first) - first, min(end, last) - first))
    return torch.cat(pieces).float().reshape(shape)


def _read_shares(rows: Sequence[Sequence[Stored]], begin: int, end: int, shape: tuple[int, ...]) -> Tensor:
    shares = [_read_row(row, begin, end, (end - begin,)) for row in rows]
    return torch.cat(shares)[: torch.Size(shape).numel()].reshape(shape)
