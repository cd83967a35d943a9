"""The whole training in miniature, on real handwritten digits: data, pretrained parts, four stages, scores, one answer.

`bash launch/quickstart.sh` sets everything up and calls this. Complete parts are reused; interrupted ones resume.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tinygptv_ds.apps.report.report import write_report
from tinygptv_ds.cli import run_command
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.distributed import free_port
from tinygptv_ds.errors import TinyGPTVError
from tinygptv_ds.evaluation.benchmarks.held_out import read_held_out
from tinygptv_ds.evaluation.cli import scores
from tinygptv_ds.evaluation.report import save_json
from tinygptv_ds.files import whole_folder
from tinygptv_ds.train.setup.job import has_gpu

ROOT = Path(__file__).resolve().parents[2]
RUN = Path("runs/quickstart")  # the recipes next to this file name it too
DATA, WEIGHTS, MODEL = RUN / "data", RUN / "weights", RUN / "model"
REPORT = RUN / "report.html"
STANDINS = Path(__file__).with_name("pretrained")  # of the pretrained parts: what standins.py made with SEED
STAGES = (1, 2, 3, 4)
TEMPLATE = "[INST] {} [/INST]"  # stage 4's, in which every stage is asked
SEED = 1


class Timings:
    """Seconds spent on each part, over all attempts, kept in `timings.json`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def run(self, name: str, make: Callable[[], bool]) -> None:
        """Do a part; its time counts unless it returns False: everything was there already."""
        began, worked = time.monotonic(), True
        try:
            worked = make()
        finally:
            if worked:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
                save_json(self._path, self.seconds)


def print_heading(text: str) -> None:
    """Print a heading."""
    print(f"\n=== {text}", flush=True)


def main(train_standins: bool = False) -> None:
    """Run all parts in order."""
    os.chdir(ROOT)
    RUN.mkdir(parents=True, exist_ok=True)
    timings = Timings(RUN / "timings.json")
    print_heading("Data: scenes of handwritten digits")
    timings.run("data", make_data)
    print_heading("Stand-ins for the pretrained parts: ViT, Q-Former, Phi")
    timings.run("weights", partial(make_weights, train_standins))
    # What scoring imports, torch and transformers, is imported meanwhile: the launcher of stage 1 leaves a core idle.
    imports = Thread(target=import_module, args=["tinygptv_ds.evaluation.runner"])
    imports.start()
    for stage in STAGES:
        print_heading(f"Stage {stage}")
        timings.run(f"stage{stage}", partial(train_stage, stage))
        imports.join()  # two threads that import transformers at once find it half made
        timings.run("scores", partial(once, scores_file(stage), partial(score_vqa, RUN / f"stage{stage}")))
    print_heading("Export, scores on held-out scenes, one answer")
    timings.run("export", export)
    timings.run("scores", partial(once, RUN / "scores" / "refer.json", partial(score_refer, MODEL)))
    result = summary(timings.seconds)
    save_json(RUN / "summary.json", result)
    show_answer()
    print_table(result)
    write_report([RUN], REPORT)
    print_seconds(timings.seconds)


def make_data() -> bool:
    """Make the shards of every embedded dataset, for training and held-out scores."""
    from tinygptv_ds.data.prepare.prepare import prepare_digits

    reports = prepare_digits(DATA, workers=2).values()
    if all(report.reused for report in reports):
        print(f"{DATA} is complete: reused")
        return False
    print(f"{DATA}: {sum(report.samples for report in reports)} samples")
    return True


def make_weights(train: bool) -> bool:
    """Copy the stand-ins that come with the project, or train them again; either is reused if it is there."""
    if not train:
        if all((WEIGHTS / file.relative_to(STANDINS)).exists() for file in STANDINS.rglob("*")):
            print(f"{WEIGHTS} is complete: reused")
            return False
        with whole_folder(WEIGHTS) as partial_folder:
            shutil.copytree(STANDINS, partial_folder, dirs_exist_ok=True)
        print(f"{WEIGHTS}: copied from {STANDINS.relative_to(ROOT)}; --train-standins makes them again")
        return True
    from stages.tiny.standins import MANIFEST, make_standins

    manifest = WEIGHTS / MANIFEST
    before = manifest.stat().st_mtime_ns if manifest.exists() else None
    made = make_standins(WEIGHTS, seed=SEED)
    print(f"{WEIGHTS}: the ViT reads {100 * made['digits_read']:.1f} % of held-out digits")
    return manifest.stat().st_mtime_ns != before


def train_stage(stage: int) -> bool:
    """Run `launch/stageN.sh` with its tiny recipe, unless that is done.

    Raises:
        TinyGPTVError: the run failed; its output says why.
    """
    run_dir = RUN / f"stage{stage}"
    if (run_dir / "model").exists():
        print(f"{run_dir} is complete: reused")
        return False
    recipe = Path(__file__).with_name(f"stage{stage}.yaml").relative_to(ROOT)
    ranks, env = launch_ranks(load_recipe(recipe).train.batch_size)
    options = ["--log_level", "warning", "--master_port", str(free_port()), "--num_gpus", str(ranks)]
    options += ["--recipe", str(recipe), "--run-dir", str(run_dir)]
    micro_batch_size = load_recipe(recipe).train.batch_size // ranks
    options += ["--set", f"train.micro_batch_size={micro_batch_size}"]
    done = subprocess.run(["bash", f"launch/stage{stage}.sh", *options], env=env, check=False)
    if done.returncode or not (run_dir / "model").exists():
        raise TinyGPTVError(
            f"stage {stage} ended with exit code {done.returncode}; the reason is above and in {run_dir}/log.txt. "
            "Run the quick start again to resume from there"
        )
    return True


def launch_ranks(batch_size: int) -> tuple[int, dict[str, str]]:
    """Return the number of ranks and their environment: every GPU that the batch divides over, or two ranks on CPUs."""
    gpus = 0
    if has_gpu():  # otherwise nothing waits for the import
        import torch

        gpus = torch.cuda.device_count()
    if gpus:
        return max(n for n in range(1, gpus + 1) if batch_size % n == 0), dict(os.environ)
    return 2, {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}


def once(file: Path, make: Callable[[], dict]) -> bool:
    """Write the result of `make` to `file` unless it is there."""
    if file.exists():
        print(f"{file} exists: reused")
        return False
    save_json(file, make())
    return True


def scores_file(stage: int) -> Path:
    """Return the file of the VQA scores after a stage."""
    return RUN / "scores" / f"vqa_stage{stage}.json"


def score_vqa(model: Path) -> dict:
    """Return the scores of held-out VQA, in stage 4's template for every stage."""
    return _score("vqa", model, "digits_vqa")


def score_refer(model: Path) -> dict:
    """Return the scores of held-out boxes."""
    return _score("refer", model, "digits_refer")


def _score(kind: str, model: Path, name: str) -> dict:
    options = ["--model", str(model), "--shards", str(DATA / name / "test"), "--out", str(RUN / "eval" / model.name)]
    options += ["--template", TEMPLATE, "--add-bos-token", "--batch-size", "125", "--dtype", "fp32", "--fresh"]
    (result,) = scores(kind, options)
    return result


def export() -> bool:
    """Export the model for inference, LoRA merged."""
    if MODEL.exists():
        print(f"{MODEL} exists: reused")
        return False
    import torch

    from tinygptv_ds.weights.export.hf import export_hf
    from tinygptv_ds.weights.resolve import resolve

    export_hf(resolve(RUN / "stage4"), MODEL, dtype=torch.float32, scores=[scores_file(4)])
    print(f"{MODEL}: written")
    return True


def summary(seconds: dict[str, float]) -> dict:
    """Return the figures of the table."""
    from tinygptv_ds.data.sets import digits

    stages = []
    for stage in STAGES:
        lines = training_lines(RUN / f"stage{stage}" / "metrics.jsonl")
        stages.append(
            {
                "stage": stage,
                "loss_first": lines[0]["train/loss"],
                "loss_last": lines[-1]["train/loss"],
                "vqa_accuracy": json.loads(scores_file(stage).read_text())["strict"] / 100,
                "seconds": seconds.get(f"stage{stage}"),  # None: this script was killed, and the stage went on alone
                "samples_per_second": lines[-1]["perf/samples_s"],
            }
        )
    vqa = [question.metadata for question in read_held_out("vqa", str(DATA / "digits_vqa/test"))]
    refer = [question.metadata for question in read_held_out("refer", str(DATA / "digits_refer/test"))]
    return {
        "stages": stages,
        "vqa_accuracy": stages[-1]["vqa_accuracy"],
        "refer_iou": json.loads((RUN / "scores/refer.json").read_text())["iou"],
        "chance": digits.vqa_chance(vqa)["all"],
        "refer_chance": digits.refer_chance(refer),
        "samples_per_second": stages[-1]["samples_per_second"],
        "seconds": sum(seconds.values()),
    }


def training_lines(metrics: Path) -> list[dict]:
    """Return the lines of a run's metrics that are about steps; others hold validation losses."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def show_answer() -> None:
    """Ask the exported model one question about one held-out image, and print its answer."""
    import torch

    from tinygptv_ds.generate.conversation import Conversation
    from tinygptv_ds.generate.generate import answers
    from tinygptv_ds.generate.load import load_model
    from tinygptv_ds.generate.settings import Generation
    from tinygptv_ds.processing.templates import choose_template

    question = read_held_out("vqa", str(DATA / "digits_vqa/test"), 1)[0]
    image = RUN / "example.jpg"
    (encoded,) = question.images()
    assert isinstance(encoded, bytes)  # shards hold encoded images
    image.write_bytes(encoded)
    model, processor = load_model(MODEL, torch.float32)
    template = choose_template(TEMPLATE, processor.prompt_template, "###")
    prompt = Conversation(template).ask(question.text, question.images())
    (answer,) = answers(model, processor, [prompt], Generation(max_new_tokens=20))
    print(f"{image}: {question.metadata['text']}\n  answer: {answer}   (true: {question.truth})")


def print_table(result: dict) -> None:
    """Print the results."""
    chance, refer_chance = result["chance"], result["refer_chance"]
    print("\n stage | loss before -> after | held-out VQA | samples/s | seconds")
    print(" ------|----------------------|--------------|-----------|--------")
    for row in result["stages"]:
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        print(
            f" {row['stage']:>5} | {row['loss_first']:>9.3f} -> {row['loss_last']:<7.3f} | "
            f"{100 * row['vqa_accuracy']:>10.1f} % | {row['samples_per_second']:>9.0f} | {seconds:>7}"
        )
    print(f"\n held-out VQA accuracy  {100 * result['vqa_accuracy']:5.1f} %   (chance {100 * chance:.1f} %)")
    print(f" held-out refer IoU     {result['refer_iou']:5.3f}     (chance {refer_chance:.3f})")
    print(f" run directory {RUN}, model {MODEL}, figures {RUN / 'summary.json'}")
    print(f" curves, mixture and sample answers {REPORT}; TensorBoard: tensorboard --logdir {RUN}")


def print_seconds(seconds: dict[str, float]) -> None:
    """Print how long each part took, over all attempts."""
    parts = ", ".join(f"{name} {taken:.0f}" for name, taken in seconds.items())
    print(f" total {sum(seconds.values()):.0f} s: {parts}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--train-standins",
        action="store_true",
        help="train the stand-ins of ViT, Q-Former and Phi (two minutes more) instead of copying those of the project",
    )
    run_command(partial(main, **vars(parser.parse_args())))
