"""One fine-tuning: its files, and the verbs that it consists of, in their order."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.config.recipe import ModelSection, Recipe
from tinygptv_ds.data.prepare.held_out import HELD_OUT, TRAIN
from tinygptv_ds.data.shards.cache import ShardCache, count_samples
from tinygptv_ds.data.shards.patterns import expand_shards
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.shards.records import parse_record
from tinygptv_ds.distributed import free_port
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.evaluation.caption_metrics import check_packages
from tinygptv_ds.files import sha256
from tinygptv_ds.finetune.devices import Devices
from tinygptv_ds.finetune.inputs import Source
from tinygptv_ds.finetune.phases import Phase, Progress
from tinygptv_ds.finetune.recipe import CAPTION_POOL, Data, compose, write_recipe
from tinygptv_ds.finetune.start import Start
from tinygptv_ds.processing.text import IMAGE_TAG, load_prompts

_LOOKED_AT = 500  # held-out samples whose kind is looked at


@dataclass(frozen=True)
class Planned:
    """The verbs around the recipe.

    Attributes:
        before: those of the plan: cost and preview.
        after: those that take time.
    """

    before: tuple[Phase, ...]
    after: tuple[Phase, ...]


@dataclass(frozen=True)
class Composed:
    """The recipe that is in place.

    Attributes:
        recipe: its values.
        digest: of its file.
        deepspeed: the DeepSpeed JSON that goes with it.
    """

    recipe: Recipe
    digest: str
    deepspeed: str


@dataclass(frozen=True)
class Job:
    """A fine-tuning.

    Attributes:
        out: the exported model.
        work: everything else.
        source: how the data are read.
        held_out: for `prepare --held-out`.
        start: the weights.
        devices: what it runs on.
        overrides: changes to the recipe.
    """

    out: Path
    work: Path
    source: Source
    held_out: str
    start: Start
    devices: Devices
    overrides: tuple[str, ...] = ()

    @property
    def recipe_path(self) -> Path:
        """The recipe."""
        return self.work / "recipe.yaml"

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.work / "run"

    def scores(self, when: str) -> Path:
        """Return the file of the scores "before" or "after"."""
        return self.work / "scores" / f"{when}.json"

    def data_phases(self) -> list[Phase]:
        """Return the preparation, if the data are not shards already."""
        if self.source.shards is not None:
            return []
        folder = self.work / "data"
        argv = ("prepare", self.source.format, *self.source.options, "--out", str(folder), "--held-out", self.held_out)
        return [Phase("prepare", "Data: shards for training, and a part of the images held out", argv)]

    def data(self) -> Data:
        """Return what has been prepared.

        Raises:
            DataError: shards are missing or cannot be read.
        """
        train, held_out = self._shards()
        cache = ShardCache()
        counts = {place: sum(count_samples(expand_shards(place), cache)) for place in (train, held_out)}
        records = _records(held_out, cache)
        captions = bool(records) and all("caption" in record for record in records)
        kind = "caption" if captions and can_score_captions() else "vqa"
        return Data(train, held_out, counts[train], counts[held_out], kind, captions)

    def write_recipe(self, data: Data, progress: Progress) -> Composed:
        """Write the recipe, unless training has begun with the one that is there.

        Raises:
            ConfigError: a value of `--set` is not valid, or has changed since training has ended.
        """
        noted = next((entry["recipe"] for entry in reversed(progress.entries) if "recipe" in entry), None)
        if noted is not None and progress.began("train") and self.recipe_path.is_file():
            if noted["set"] == list(self.overrides):
                return Composed(load_recipe(self.recipe_path), sha256(self.recipe_path), noted["deepspeed"])
            if progress.ended("train"):
                raise ConfigError(
                    f"{self.run_dir} has been trained with --set {noted['set']}, now it is {list(self.overrides)}; "
                    "choose another --out for another training"
                )
        written = compose(
            stage=self.start.stage,
            model=self.start.model,
            text=self.start.text,
            width=self.start.width,
            data=data,
            devices=self.devices,
            title=f"Fine-tuning of {self.start.path} on {data.samples} samples, on {self.devices}.",
            overrides=self.overrides,
        )
        write_recipe(self.recipe_path, written)
        deepspeed = f"ds_configs/{written.fit.deepspeed}"
        progress.note({"recipe": {"set": list(self.overrides), "deepspeed": deepspeed}})
        return Composed(written.recipe, sha256(self.recipe_path), deepspeed)

    def phases(self, data: Data, composed: Composed) -> Planned:
        """Return everything that follows the recipe."""
        recipe, digest = str(self.recipe_path), composed.digest
        preview = ("preview", recipe, "--out", str(self.work / "preview.html"), "--queries", str(self.start.queries))
        train = (
            *("train", f"stage{self.start.stage}", "--num-gpus", str(self.devices.ranks), "--recipe", recipe),
            *("--run-dir", str(self.run_dir), "--deepspeed-config", composed.deepspeed),
        )
        export = ("export", str(self.run_dir), "--out", str(self.out), "--dtype", self.start.dtype)
        quiet = ("--master-port", str(free_port()), "--log-level", "warning")
        bits = _as_trained(composed.recipe.model)
        template, model = composed.recipe.text.prompt_template, self.run_dir / "model"
        before = self._eval(data, "before", self.start.path, (*self._of_start(template), *bits))
        after = self._eval(data, "after", self.out, bits)
        return Planned(
            before=(
                Phase("estimate", "Cost", ("estimate", recipe, "--gpus", str(self.devices.ranks)), depends=digest),
                Phase("preview", "Samples as the model will see them", preview, depends=digest),
            ),
            after=(
                Phase("before", "Score before training, on the held-out samples", before),
                Phase("train", "Training", train, model.exists, digest, quiet),
                Phase("export", "Export", export, self.out.exists, digest),
                Phase("after", "Score after training, on the same samples", after, depends=digest),
            ),
        )

    def _eval(self, data: Data, when: str, model: Path, options: tuple[str, ...]) -> tuple[str, ...]:
        # Captions are asked for as they will be trained, whatever the weights were trained with before.
        words = ("--instruction", caption_instruction()) if data.captions else ()
        return (
            *("eval", data.kind, "--model", str(model), "--shards", data.held_out, *words, *options),
            *("--out", str(self.scores(when).with_suffix("")), "--json", str(self.scores(when))),
        )

    def _of_start(self, template: str | None) -> tuple[str, ...]:
        """Return the options with which the verbs open the weights before training, and ask as in training."""
        options = [option for change in self.start.base for option in ("--set", change)]
        options += ["--recipe", str(self.start.recipe)] if self.start.recipe is not None else []
        options += ["--template", template] if template is not None and template != self.start.template else []
        if not self.start.whole:  # the scores would otherwise go onto the TensorBoard of the run that it is of
            options += ["--tensorboard", str(self.work / "scores/before"), "--step", "0"]
        return tuple(options)

    def _shards(self) -> tuple[str, str]:
        """Return the places of training and held-out shards."""
        if self.source.shards is None:
            return str(self.work / "data" / TRAIN), str(self.work / "data" / HELD_OUT)
        folder = self.source.shards
        names = sorted(path.name for path in folder.glob("*.tar"))
        if len(names) < 2:
            raise DataError(
                f"--data {folder}: one tar cannot be divided into training and held-out samples; give at least two, or "
                "the annotations that it was made of"
            )
        held_out = max(1, round(len(names) / 10))
        return _pattern(folder, names[:-held_out]), _pattern(folder, names[-held_out:])


def can_score_captions() -> bool:
    """Return whether CIDEr and BLEU can be computed here; else captions are scored as answers in words."""
    try:
        check_packages()
    except ConfigError as error:
        print(f"note: {error}; without them, captions are scored by their words (f1)")
        return False
    return True


def _as_trained(model: ModelSection) -> tuple[str, ...]:
    """Return the options of `eval` for a card that holds frozen weights in 4 or 8 bit only."""
    if model.frozen_bits is None:
        return ()
    return ("--bits", str(model.frozen_bits), *(["--quantize-vision"] if model.quantize_vision else []))


def caption_instruction() -> str:
    """Return the first of the requests that captions are trained with, without its image tag."""
    return load_prompts()[CAPTION_POOL][0].replace(IMAGE_TAG, "").strip()


def _pattern(folder: Path, names: list[str]) -> str:
    return str(folder / (names[0] if len(names) == 1 else f"{{{','.join(names)}}}"))


def _records(shards: str, cache: ShardCache) -> list[dict[str, Any]]:
    reader, records = ShardReader(cache=cache), list[dict[str, Any]]()
    tars = expand_shards(shards)
    for tar, count in zip(tars, count_samples(tars, cache), strict=True):
        for index in range(min(count, _LOOKED_AT - len(records))):
            key, stored, _ = reader.stored(tar, index)
            if stored is not None:
                records.append(parse_record(stored, f"{tar}: sample {key}"))
    return records


def example(data: Data, folder: Path) -> tuple[Path, str] | None:
    """Write the image of the first held-out sample that has one question about it; return its path and the question."""
    reader = ShardReader(cache=ShardCache())
    for tar in expand_shards(data.held_out):
        raw = reader.read(tar, 0)
        turns = raw.record.get("conversation") or [[raw.record.get("text", caption_instruction())]]
        if raw.images:
            path = folder / "example.jpg"
            path.write_bytes(raw.images[0])
            return path, str(turns[0][0])
    return None


def read_scores(path: Path) -> dict[str, Any]:
    """Read a result that `eval` has written."""
    return json.loads(path.read_text(encoding="utf-8"))
