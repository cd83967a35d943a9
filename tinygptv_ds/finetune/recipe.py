"""The recipe of a fine-tuning: its values from the weights, the data and the devices, with the reason for each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tinygptv_ds.config.data_section import DataSection, DatasetSection
from tinygptv_ds.config.evaluation_section import EvaluationSection, ScoredSection
from tinygptv_ds.config.load import apply_overrides, build_recipe, recipe_dict
from tinygptv_ds.config.recipe import ModelSection, OptimizerSection, Recipe, TextSection, TrainSection
from tinygptv_ds.config.render import render
from tinygptv_ds.files import write_atomically
from tinygptv_ds.finetune.devices import Devices, Fit, fit
from tinygptv_ds.finetune.schedule import LR_SCALE, Given, Schedule, plan_schedule

CAPTION_POOL = "stage3"
HELD_OUT = "held_out"
_BITS = ("model.frozen_bits", "model.quantize_vision")
_SECTIONS = ("stage", "seed", "model", "text", "data", "optimizer", "train", "evaluation", "deepspeed")


@dataclass(frozen=True)
class Data:
    """The prepared data.

    Attributes:
        train: shards of the training samples.
        held_out: shards of the held-out samples.
        samples: number of training samples.
        held_out_samples: number of held-out samples.
        kind: how the held-out samples are scored: "vqa" or "caption".
        captions: whether all samples are captions, without a question of their own.
    """

    train: str
    held_out: str
    samples: int
    held_out_samples: int
    kind: str = "vqa"
    captions: bool = False


@dataclass(frozen=True)
class Written:
    """A recipe, ready to be written.

    Attributes:
        recipe: the checked values.
        text: the YAML, commented.
        fit: how it fits into the devices' memory.
        schedule: its length and learning rate, before changes by `--set`.
    """

    recipe: Recipe
    text: str
    fit: Fit
    schedule: Schedule


def compose(
    *,
    stage: int,
    model: ModelSection,
    text: TextSection,
    width: int,
    data: Data,
    devices: Devices,
    title: str,
    overrides: Sequence[str] = (),
) -> Written:
    """Compose the recipe.

    Args:
        stage: the stage that trained the weights, whose parts are trained on.
        model: the model section that builds on them.
        text: the template and limits that they were trained with.
        width: Phi's width.
        data: the prepared data.
        devices: what it will run on.
        title: the first line of the file.
        overrides: changes by `--set`, which come last; batch size and epochs among them count for the rest, too.

    Raises:
        ConfigError: a change is not valid, or nothing fits into the devices' memory.
    """
    given = _given(overrides)
    schedule = plan_schedule(data.samples, devices.ranks, width, given)
    if data.captions:
        text = dataclasses.replace(text, prompts=CAPTION_POOL)
    first = Recipe(
        stage=stage,
        model=model,
        text=text,
        data=_data(data, devices),
        optimizer=OptimizerSection(
            lr=schedule.lr,
            min_lr=float(f"{schedule.min_lr:.1e}"),
            warmup_lr=float(f"{schedule.lr / 100:.1e}"),
            warmup_steps=schedule.warmup_steps,
            schedule="cosine",
            lr_scale=dict(LR_SCALE),
        ),
        train=_train(schedule),
        evaluation=_evaluation(data, schedule),
        deepspeed={"gradient_clipping": 1.0},
    )
    recipe = build_recipe(apply_overrides(recipe_dict(first), overrides), "--set")
    own = {key for key, _, _ in (text.partition("=") for text in overrides)}
    found = fit(recipe, devices, keep_bits=not own.isdisjoint(_BITS))
    chosen: dict[str, Any] = {"train.micro_batch_size": found.micro_batch_size}
    chosen |= {"model.gradient_checkpointing": True} if found.gradient_checkpointing else {}
    chosen |= dict(zip(_BITS, (found.frozen_bits, found.quantize_vision), strict=True)) if found.frozen_bits else {}
    changes = [f"{key}={yaml.safe_dump(value).split()[0]}" for key, value in chosen.items() if key not in own]
    if "train.max_tokens" in own:
        changes = [change for change in changes if not change.startswith("train.micro_batch_size")]
    recipe = build_recipe(apply_overrides(recipe_dict(recipe), changes), "--set")
    remarks = _remarks(data, devices, schedule, found) | dict.fromkeys(own, "given with --set")
    return Written(recipe, to_yaml(recipe, remarks, [title, *_HEADER]), found, schedule)


def _given(overrides: Sequence[str]) -> Given:
    raw = apply_overrides({}, [text for text in overrides if text.startswith("train.")]).get("train", {})
    chosen = {name: raw.get(name) for name in ("batch_size", "epochs")}
    return Given(**{name: value for name, value in chosen.items() if isinstance(value, int) and value > 0})


def _data(data: Data, devices: Devices) -> DataSection:
    return DataSection(
        datasets=[DatasetSection("train", data.train)],
        validation=[DatasetSection(HELD_OUT, data.held_out)],
        num_workers=0 if devices.gib is None else 4,
        max_skipped_share=0.05,
    )


def _train(schedule: Schedule) -> TrainSection:
    return TrainSection(
        batch_size=schedule.batch_size,
        micro_batch_size=1,
        epochs=schedule.epochs,
        steps_per_epoch=schedule.steps_per_epoch,
        log_every=max(1, min(10, schedule.steps_per_epoch // 2)),
        sample_every=0,
        validate_every=schedule.steps_per_epoch,
        checkpoint_every=schedule.steps_per_epoch,
        keep_checkpoints=2,
        keep_best="val/loss",
        result="best",
    )


def _evaluation(data: Data, schedule: Schedule) -> EvaluationSection:
    scored = ScoredSection(kind=data.kind, shards=data.held_out, name=HELD_OUT)
    return EvaluationSection(
        benchmarks=[scored],
        every=schedule.steps_per_epoch * math.ceil(schedule.epochs / 3),
    )


_HEADER = (
    "Written by `tinygptv-ds finetune`; train with it by hand as shown in docs/finetune.md. What follows a # after a",
    "value says why it is that value. Every key is listed; the comments above them are those of all recipes",
    "(python -m tinygptv_ds.config.render).",
    "",
    "Trained are LoRA, the norms of Phi and the two projections, as in stages 2 to 4: TinyGPT-V's norms keep Phi",
    "stable and belong to its LoRA, and the projections carry what is particular to your images. ViT, Q-Former and Phi",
    "stay frozen: they know more than a small set can teach, and gradients and optimizer of Phi alone take 44 GB.",
    "With tens of thousands of samples the Q-Former can be trained, too:",
    "--set 'model.train=[projections, norms, lora, qformer]' --set 'optimizer.lr_scale={qformer: 0.1}'.",
)


def _remarks(data: Data, devices: Devices, schedule: Schedule, found: Fit) -> dict[str, str]:
    """Return the reasons, by dotted key."""
    return {
        "stage": "of the weights; the same parts are trained",
        "model.init_from": "the weights that are fine-tuned",
        "model.image_size": "as in the weights",
        "model.lora_r": "as in the weights; enough for thousands of samples",
        "model.lora_dropout": "a small set is seen many times",
        "model.gradient_checkpointing": found.reason if found.gradient_checkpointing else "not needed for the memory",
        "model.frozen_bits": f"{found.reason}; more do not fit" if found.frozen_bits else "not needed for the memory",
        "text.prompt_template": "as in the weights",
        "text.prompts": "captions have no question of their own" if data.captions else "the data have questions",
        "data.num_workers": "the CPU trains" if devices.gib is None else "",
        "data.max_skipped_share": "`prepare` has left out what cannot be used; a few more do not end the run",
        "optimizer.lr": "1e-4 at Phi-2's width, half of LLaVA-1.5's at batches of 128; more for narrower models",
        "optimizer.min_lr": "a tenth",
        "optimizer.warmup_steps": f"3 % of {schedule.steps} steps",
        "optimizer.schedule": "falls from the end of the warm-up to the last step",
        "optimizer.lr_scale": "they are trained already; LLaVA-1.5's projector learns at a tenth of LoRA's rate",
        "train.batch_size": f"{data.samples} samples x {schedule.epochs} epochs in about 200 steps of 4 to 64 samples",
        "train.micro_batch_size": found.reason,
        "train.epochs": "10 for fewer than 100 samples, 8 below 1,000, 5 below 10,000, then 3",
        "train.steps_per_epoch": f"{data.samples} samples / {schedule.batch_size}",
        "train.validate_every": "once an epoch",
        "train.checkpoint_every": "once an epoch",
        "train.keep_best": "of all epochs, the one with the lowest loss on the held-out samples",
        "train.result": "a small set is soon overfitted",
        "evaluation.every": "about three times",
        "deepspeed": "one odd sample must not throw a small batch off",
    }


def to_yaml(recipe: Recipe, remarks: dict[str, str], header: Sequence[str]) -> str:
    """Return a recipe as commented YAML.

    Args:
        recipe: the values.
        remarks: the remark after a value, by dotted key; "" for nothing.
        header: lines of comment above everything.
    """
    lines = [f"# {line}".rstrip() for line in header]
    for name in _SECTIONS:
        value = getattr(recipe, name)
        remark = _behind(remarks.get(name))
        if not dataclasses.is_dataclass(value):
            lines += [*([""] if name in ("stage", "deepspeed") else []), f"{name}: {_flow(value)}{remark}"]
            continue
        lines += ["", f"{name}:{remark}"]
        for field in dataclasses.fields(value):
            lines += _entry(field.name, getattr(value, field.name), _behind(remarks.get(f"{name}.{field.name}")))
    return render("\n".join(lines) + "\n")


def _entry(key: str, value: Any, remark: str) -> list[str]:
    if isinstance(value, list) and value and all(map(dataclasses.is_dataclass, value)):
        return [f"  {key}:{remark}", *(f"    - {_flow(_without_defaults(item))}" for item in value)]
    return [f"  {key}: {_flow(value)}{remark}"]


def _without_defaults(section: Any) -> dict[str, Any]:
    """Return what a dataset or a scored set says, without what is as by default."""
    values = {field.name: (getattr(section, field.name), field.default) for field in dataclasses.fields(section)}
    return {name: value for name, (value, default) in values.items() if value != default and value != {}}


def _behind(remark: str | None) -> str:
    return f"  # {remark}" if remark else ""


def _flow(value: Any) -> str:
    """Return a value on one line; a small number as 1.0e-5, which YAML reads as a number."""
    if isinstance(value, float) and value and abs(value) < 1e-3:
        return f"{value:.1e}"
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False)
    return text.strip().removesuffix("\n...").strip()


def write_recipe(path: Path, written: Written) -> None:
    """Write the recipe's text."""
    write_atomically(path, written.text.encode())
