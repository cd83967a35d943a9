"""A run that was interrupted again and again, compared with one that was not."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tinygptv_ds.errors import TinyGPTVError
from tinygptv_ds.files import sha256
from tinygptv_ds.train.checkpoint.folders import FOLDER, complete_ones
from tinygptv_ds.train.checkpoint.storage import read_state

LOSSES = 1e-5  # relative
# The same ranks and ZeRO stage give the same bits. Others round differently, and where a gradient is nothing but
# rounding, AdamW makes a full step of it: a few weights in thousands may then differ by more than all the others.
WEIGHTS, ODD_WEIGHTS, ODD_SHARE = 1e-6, 1e-4, 1e-3
_FILES = {"recipe.yaml", "deepspeed.json", "versions.json", "machine.json", "lock.json", "log.txt", "metrics.jsonl"}
_FOLDERS = {"checkpoints", "model", "tensorboard", "stacks", "deepspeed", "skipped", "samples"}
Samples = list[list[Any]]  # of one step: position, dataset, epoch, shard and index of each


@dataclass
class Reference:
    """What the uninterrupted run was fed and came to.

    Attributes:
        samples: of each step.
        losses: of each step.
        weights: the file of its `model/`.
    """

    samples: dict[int, Samples]
    losses: dict[int, float]
    weights: Path

    @classmethod
    def of(cls, run_dir: Path, records: Path) -> Reference:
        """Read those of a finished run."""
        fed = {step: samples for step, (samples, _) in read_fed(records).items()}
        return cls(fed, read_losses(run_dir)[0], run_dir / "model/trained.safetensors")


@dataclass
class Comparison:
    """How an interrupted run differs.

    Attributes:
        problems: what must not be.
        samples: how many the run was fed, in its effective history.
        lost: how many of the reference's it was not fed, or not in its place.
        wrong: records, effective or not, of samples that do not belong to their step.
        loss: largest relative difference of a loss.
        weight: largest difference of a weight.
        odd_weights: how many weights differ by more than 1e-6.
        bit_equal: whether all weights are the same bit for bit.
    """

    problems: list[str]
    samples: int = 0
    lost: int = 0
    wrong: int = 0
    loss: float = 0.0
    weight: float = 0.0
    odd_weights: int = 0
    bit_equal: bool = False


def read_fed(records: Path) -> dict[int, tuple[Samples, int]]:
    """Return, by step, the samples of the attempt that fed it last, in the stream's order, and its number of ranks.

    A step that counts was fed by all ranks of that attempt, and by none later.
    """
    last = {rank: {line["step"]: line for line in lines} for rank, lines in _lines(records).items()}
    fed = {}
    for step, line in last.get(0, {}).items():
        ranks = [last.get(rank, {}).get(step, {"ids": []}) for rank in range(line["world"])]
        fed[step] = (sorted(ref for each in ranks for micro in each["ids"] for ref in micro), line["world"])
    return fed


def _lines(records: Path) -> dict[int, list[dict[str, Any]]]:
    paths = {int(path.stem.removeprefix("fed-")): path for path in records.glob("fed-*.jsonl")}
    return {rank: [json.loads(line) for line in path.read_text().splitlines()] for rank, path in paths.items()}


def read_losses(run_dir: Path) -> tuple[dict[int, float], list[str]]:
    """Return the losses by step from metrics.jsonl, and what is wrong with the file."""
    losses: dict[int, float] = {}
    problems = []
    for line in (run_dir / "metrics.jsonl").read_bytes().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            problems.append(f"metrics.jsonl: a line is torn: {line[:60]!r}")
            continue
        if "train/loss" in values:
            if values["step"] in losses:
                problems.append(f"metrics.jsonl: step {values['step']} is there twice")
            losses[values["step"]] = values["train/loss"]
    return losses, problems


def compare(reference: Reference, run_dir: Path, records: Path, *, exact: bool, was_full: bool) -> Comparison:
    """Compare a finished run with the reference.

    Args:
        reference: the uninterrupted run.
        run_dir: the run directory.
        records: what its ranks noted.
        exact: whether ranks and ZeRO stage were the reference's all the time.
        was_full: whether its disk was; lines of metrics are then lost, as documented.
    """
    found = Comparison([])
    _compare_samples(found, reference, records)
    _compare_losses(found, reference, run_dir, was_full)
    _compare_weights(found, reference, run_dir, exact)
    found.problems += leftovers(run_dir)
    return found


def _compare_samples(found: Comparison, reference: Reference, records: Path) -> None:
    fed = {step: samples for step, (samples, _) in read_fed(records).items()}
    found.samples = sum(map(len, fed.values()))
    for step, expected in reference.samples.items():
        if fed.get(step) != expected:
            missing = [ref for ref in expected if ref not in fed.get(step, [])]
            found.lost += max(1, len(missing))
            found.problems.append(
                f"step {step} was fed {len(fed.get(step, []))} samples, {len(missing)} of its own not"
            )
    for lines in _lines(records).values():
        for line in lines:
            allowed = reference.samples.get(line["step"], [])
            found.wrong += any(ref not in allowed for micro in line["ids"] for ref in micro)
    if found.wrong:
        found.problems.append(f"{found.wrong} record(s) hold samples of other steps")


def _compare_losses(found: Comparison, reference: Reference, run_dir: Path, was_full: bool) -> None:
    losses, problems = read_losses(run_dir)
    found.problems += [problem for problem in problems if not (was_full and "torn" in problem)]
    missing = reference.losses.keys() - losses.keys()
    if missing and not was_full:
        found.problems.append(f"metrics.jsonl lacks steps {sorted(missing)}")
    shared = reference.losses.keys() & losses.keys()
    found.loss = max((abs(losses[step] / reference.losses[step] - 1) for step in shared), default=0.0)
    if found.loss > LOSSES:
        found.problems.append(f"a loss differs by {found.loss:.1e}")


def _compare_weights(found: Comparison, reference: Reference, run_dir: Path, exact: bool) -> None:
    path = run_dir / "model/trained.safetensors"
    found.bit_equal = path.read_bytes() == reference.weights.read_bytes()
    ours, theirs = load_file(path), load_file(reference.weights)
    if ours.keys() != theirs.keys():
        found.problems.append("model/ has other weights than the reference's")
        return
    differences = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in theirs])
    found.weight, found.odd_weights = float(differences.max()), int((differences > WEIGHTS).sum())
    odd = found.weight > ODD_WEIGHTS or found.odd_weights > ODD_SHARE * len(differences)
    if odd or (exact and not found.bit_equal):
        where = ", where each bit must be equal" if exact else ""
        found.problems.append(f"{found.odd_weights} weight(s) differ, by up to {found.weight:.1e}{where}")


def leftovers(run_dir: Path) -> list[str]:
    """Return what a finished run should not have left in its directory."""
    known = _FILES | _FOLDERS
    odd = [path.name for path in run_dir.iterdir() if path.name not in known]
    inside = [
        str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if re.search(r"\.(partial|old)$", path.name)
    ]
    return [f"left over: {', '.join(sorted({*odd, *inside}))}"] if odd or inside else []


def unsound(run_dir: Path) -> set[str]:
    """Return what has a final name in a run directory and is not complete."""
    problems = set()
    for folder in complete_ones(run_dir / FOLDER):
        try:
            read_state(folder)
        except TinyGPTVError as error:
            problems.add(str(error))
    model = run_dir / "model"
    if model.exists():
        try:
            noted = json.loads((model / "provenance.json").read_text())["sha256"]
            problems |= {f"{model / name} is torn" for name, digest in noted.items() if sha256(model / name) != digest}
        except (OSError, ValueError, KeyError) as error:
            problems.add(f"{model}: {error}")
    return problems
