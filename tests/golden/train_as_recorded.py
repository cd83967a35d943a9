"""Trains a model of the reference data on the recorded samples, step by step, with the engine of the project."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from helpers import tiny
from helpers.forked import CPU
from helpers.golden_model import fill, full_config, read
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.config.recipe import Recipe, TextSection
from tinygptv_ds.data.loader.batch import Batch, MicroBatch, collate
from tinygptv_ds.data.loader.sample import Sample
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.distributed import Ranks, ranks_from_env
from tinygptv_ds.models.parameters import lora, needs_images, norms, projections, train_only
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.image import to_pixels
from tinygptv_ds.processing.sequence import ImageTokens, build_sequence
from tinygptv_ds.processing.text import Rendered, render
from tinygptv_ds.train.engine import MOMENTS, Engine, init_process_group
from tinygptv_ds.train.liveness.progress import Progress
from tinygptv_ds.train.run import Run
from tinygptv_ds.train.schedule import learning_rate_of_step
from tinygptv_ds.train.step import optimizer_step
from tinygptv_ds.train.transfer import Transfer
from tinygptv_ds.weights.folders import open_weights
from tinygptv_ds.weights.layouts.tinygptv import original_source

Example = tuple[Rendered, list[bytes]]


def main(argv: Sequence[str]) -> None:
    """Train and write losses, learning rates and weights, once with each change of DeepSpeed's JSON.

    Args:
        argv: the folder of a training set, where to write, the changes by the name of their folder, and the first and
            the last step, from 0; the recorded processes are the ranks.
    """
    folder, out, changes, first, last = Path(argv[0]), Path(argv[1]), json.loads(argv[2]), int(argv[3]), int(argv[4])
    ranks = ranks_from_env()
    init_process_group(ranks, timedelta(minutes=5))
    for name, deepspeed in changes.items():
        train(folder, out / name, ranks, deepspeed, range(first, last + 1))


def train(folder: Path, out: Path, ranks: Ranks, deepspeed: dict[str, Any], steps: range) -> None:
    golden, raw, recorded = folder.parents[1], read(folder / "recipe.json"), read(folder / "steps.json")
    recipe, model = recipe_of(raw), start_model(golden, raw)
    sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config = {key: value for key, value in read(CPU).items() if key != "comment"} | sizes | deepspeed
    engine = Engine(model, config, recipe.optimizer, ranks)
    job = SimpleNamespace(recipe=recipe, ranks=ranks)
    run = Run(job, engine, Progress(0, recipe.train, lambda timeout: None))
    batches = batches_of(golden, folder, raw, model)
    log = Log(engine)
    for number in steps:
        step = recorded[number]
        processes = step.get("processes", [step])
        mine = [batches(process["samples"]) for process in processes[ranks.rank :: ranks.world_size]]
        log.begin(step["has_image"])
        optimizer_step(run, number, [MicroBatch(batch, ()) for batch in mine], log, Transfer(engine.device))
        log.end(learning_rate_of_step(number, recipe))
    log.write(out, ranks)


class Log:
    """Losses of this rank's micro-batches, and whether steps without an image have left what needs images alone."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._before: dict[str, Tensor] | None = None
        self._has_state = False
        self.losses: list[list[float]] = []
        self.rates: list[float] = []
        self.kept: list[bool] = []

    def add(self, step: int, micro_batch: MicroBatch, batch: Batch, losses: Tensor) -> None:
        """Stand in for the accumulator of the trainer."""
        self.losses[-1].append(losses.double().mean().item())

    def begin(self, has_image: bool) -> None:
        self.losses.append([])
        self._before = None if has_image else self._image_state()

    def end(self, rate: float) -> None:
        self.rates.append(rate)
        self._has_state = True
        if self._before is not None:
            after = self._image_state()
            self.kept.append(all(torch.equal(after[name], before) for name, before in self._before.items()))

    def _image_state(self) -> dict[str, Tensor]:
        """Return weights, moments and step count of what needs images, on rank 0."""
        state = {f"weight/{name}": value for name, value in self._engine.trained_state().items()}
        for moment in MOMENTS if self._has_state else ():
            state |= {f"{moment}/{name}": value for name, value in self._engine.moments(moment).items()}
        state = {key: value for key, value in state.items() if needs_images(key.split("/", 1)[1])}
        # What the next forward pass computes with, too, which may be another copy.
        return state | {"steps": torch.tensor(self._engine.image_steps if self._has_state else 0)}

    def write(self, out: Path, ranks: Ranks) -> None:
        state = self._engine.trained_state()
        result = {"losses": self.losses, "lrs": self.rates, "kept": self.kept}
        result["optimizer_steps"] = [self._engine.optimizer_steps, self._engine.image_steps]
        (out / f"rank{ranks.rank}.json").write_text(json.dumps(result))
        if ranks.is_main:
            save_file(state, out / "trained.safetensors")


def recipe_of(raw: dict[str, Any]) -> Recipe:
    """Return the recorded settings as a recipe of this project; paths, which nothing reads here, are made up."""
    schedule, optimizer = raw["schedule"], raw["optimizer"]
    assert (schedule["lr_sched"], optimizer["name"], optimizer["eps"]) == ("linear_warmup_cosine_lr", "AdamW", 1e-8)
    assert (optimizer["gradient_clipping"], optimizer["accum_grad_iters"]) == (0, 1)
    made = tiny.recipe(Path("none"), {"recorded": Path("none")})
    made["text"] = {
        "prompt_template": raw["prompt_template"] if raw["chat_template"] else None,
        "end_sym": raw["end_sym"],
        "max_txt_len": raw["max_txt_len"],
        "max_context_len": raw["max_context_len"],
    }
    made["optimizer"] = {
        "schedule": "published",
        "lr": schedule["init_lr"],
        "min_lr": schedule["min_lr"],
        "warmup_lr": schedule["warmup_lr"],
        "warmup_steps": schedule["warmup_steps"],
        "betas": optimizer["betas"],
        "weight_decay": optimizer["weight_decay"],
    }
    processes = raw.get("processes", 1)
    made["train"] = {
        "batch_size": raw["batch_size"] * processes,
        "micro_batch_size": raw["batch_size"],
        "epochs": schedule["max_epoch"],
        "steps_per_epoch": schedule["iters_per_epoch"],
        "loss_reduction": "micro_batch_mean" if processes > 1 else "step_mean",
    }
    return build_recipe(made, "recorded")


def start_model(golden: Path, raw: dict[str, Any]) -> TinyGPTVForConditionalGeneration:
    config = read(golden / raw["model"] / "config.json")
    config |= {name: raw[name] for name in ("lora_r", "lora_alpha", "end_sym")} | {"lora_dropout": raw["dropout"]}
    config["vit"] |= {"img_size": raw["image_size"]}
    config["phi"] |= {"resid_pdrop": raw["dropout"]}
    model = TinyGPTVForConditionalGeneration(full_config(config, golden / raw["model"]))
    path = golden / raw["start_weights"]
    fill(model, original_source(open_weights(path), path))
    train_only(model, projections, norms, *([lora] if raw["lora_r"] else []))
    return model


def batches_of(golden: Path, folder: Path, raw: dict[str, Any], model: TinyGPTVForConditionalGeneration) -> Any:
    """Return a function from recorded samples, `[dataset, number]` each, to a batch."""
    tokenizer = AutoTokenizer.from_pretrained(golden / raw["tokenizer"])
    config = model.config
    image = ImageTokens(config.image_token_id, config.num_query_tokens)
    settings = recipe_of(raw).text
    examples = dict(read_examples(folder.parent / raw.get("samples_of", folder.name)))

    def batch(samples: list[tuple[str, int]]) -> Batch:
        rows = [row(examples[dataset][number], tokenizer, settings, image) for dataset, number in samples]
        made = [
            Sample(SampleRef(place, "recorded", 0, 0, place), sequence, stacked)
            for place, (sequence, stacked) in enumerate(rows)
        ]
        sizes = {"queries": image.count, "image_size": raw["image_size"], "bos": config.bos_token_id}
        return collate(made, ["recorded"], **sizes)

    def row(example: Example, tokenizer: Any, settings: TextSection, image: ImageTokens) -> tuple:
        rendered, images = example
        sequence = build_sequence(rendered, len(images), tokenizer, settings, image, lambda _: 0)
        pixels = [to_pixels(encoded, raw["image_size"]) for encoded in images]
        empty = torch.zeros(0, 3, 1, 1, dtype=torch.uint8).numpy()
        return sequence, torch.stack(list(map(torch.as_tensor, pixels))).numpy() if pixels else empty

    return batch


def read_examples(folder: Path) -> Iterator[tuple[str, list[Example]]]:
    """Yield the datasets of a training set: from `samples.json` with its images, or captions from shards."""
    if (folder / "samples.json").is_file():
        for dataset, samples in read(folder / "samples.json").items():
            yield dataset, [spoken(folder, sample) for sample in samples]
        return
    for shards in sorted({tar.parent for tar in folder.glob("*/*.tar")}):
        yield shards.name, [each for tar in sorted(shards.glob("*.tar")) for each in captioned(tar)]


def spoken(folder: Path, sample: dict[str, Any]) -> Example:
    images = [] if sample["image"] is None else [(folder / sample["image"]).read_bytes()]
    return Rendered(tuple((question, answer) for question, answer in sample["turns"])), images


def captioned(shard: Path) -> Iterator[Example]:
    with tarfile.open(shard) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    for name in sorted(name for name in members if name.endswith(".json")):
        caption = json.loads(members[name])["caption"]
        (image,) = [data for other, data in members.items() if other.startswith(name[:-4]) and other.endswith("g")]
        yield render({"caption": caption}, 1, lambda _: 0), [image]
