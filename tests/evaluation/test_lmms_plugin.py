"""The plug-in inside the real lmms-eval, on tasks made of local files. Skipped where lmms-eval is not installed."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from helpers import tiny

from tinygptv_ds.evaluation.benchmarks.held_out import read_held_out

pytest.importorskip("lmms_eval")
ROOT = Path(__file__).parents[2]

UTILS = """
from PIL import Image

def images(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def score(doc, results):
    return {"same": float(results[0] == doc["answer"]), "empty": float(results[0] == "")}
"""
GENERATED = """
task: local_vqa
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 6, do_sample: false, until: ["\\n\\n"]}}
process_results: !function utils.score
metric_list:
  - {{metric: same, aggregation: mean, higher_is_better: true}}
  - {{metric: empty, aggregation: mean, higher_is_better: false}}
"""
CHOSEN = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.images
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Six questions with their images as files."""
    made = tiny.samples("vqa", 6)
    questions = read_held_out("vqa", str(tiny.write_shards(tmp_path / "shards", made)))
    rows = []
    for number, question in enumerate(questions):
        image = tmp_path / f"{number}.png"
        image.write_bytes(question.images()[0])
        choices = [question.truth, "left bus", "the red colour of what"]
        rows.append({"image": str(image), "question": question.text, "answer": question.truth, "choices": choices})
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "utils.py").write_text(UTILS)
    for name, text in (("local_vqa", GENERATED), ("local_choice", CHOSEN)):
        (folder / f"{name}.yaml").write_text(text.format(data=data, cache=tmp_path / "cache"))
    return folder


def test_it_is_found_by_its_entry_point() -> None:
    if not entry_points(group="lmms_eval.models", name="tinygptv"):
        pytest.skip("tinygptv_ds is not installed as a package")
    from lmms_eval.models import get_model

    assert get_model("tinygptv").__module__ == "tinygptv_ds.evaluation.lmms_plugin"


@pytest.mark.timeout(300)
def test_tasks_of_local_files(tasks: Path, exported: Path, tmp_path: Path) -> None:
    """The answers are those of our own way to ask, and the likeliest choice that of our losses."""
    if not entry_points(group="lmms_eval.models", name="tinygptv"):
        pytest.skip("tinygptv_ds is not installed as a package")
    arguments = f"pretrained={exported},dtype=fp32"
    command = [sys.executable, "-m", "lmms_eval", "--model", "tinygptv", "--model_args", arguments, "--batch_size", "4"]
    command += ["--include_path", str(tasks), "--tasks", "local_vqa,local_choice", "--log_samples"]
    out = tmp_path / "out"
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([*command, "--output_path", str(out)], env=env, capture_output=True, text=True, check=False)
    said = done.stdout[-5000:] + done.stderr[-5000:]
    assert done.returncode == 0 and any(out.rglob("*_results.json")), said
    samples = {
        name: [json.loads(line) for line in next(out.rglob(f"*samples_{name}.jsonl")).read_text().splitlines()]
        for name in ("local_vqa", "local_choice")
    }
    import torch

    from tinygptv_ds.generate.candidates import Choice, candidate_losses
    from tinygptv_ds.generate.conversation import Conversation
    from tinygptv_ds.generate.generate import answers
    from tinygptv_ds.generate.load import load_model
    from tinygptv_ds.generate.settings import Generation
    from tinygptv_ds.processing.templates import choose_template

    model, processor = load_model(exported, torch.float32)
    rows = [json.loads(line) for line in (tasks / "data.jsonl").read_text().splitlines()]
    template = choose_template("training", processor.prompt_template, processor.end_sym)
    asked = [Conversation(template).ask(row["question"], [row["image"]]) for row in rows]
    ours = list(answers(model, processor, asked, Generation(max_new_tokens=6)))
    assert [sample["filtered_resps"] for sample in samples["local_vqa"]] == ours
    assert len(set(ours)) > 1
    choices = [Choice(prompt, row["choices"]) for prompt, row in zip(asked, rows, strict=True)]
    losses = candidate_losses(model, processor, choices, end_sym="", max_prompt_tokens=999, max_answer_tokens=999)
    sums = [(each.means * each.tokens).tolist() for each in losses]
    theirs = [[float(pair[0]) for pair in sample["filtered_resps"]] for sample in samples["local_choice"]]
    assert theirs == [pytest.approx(each, rel=1e-4) for each in sums]
    results = json.loads(next(out.rglob("*_results.json")).read_text())["results"]
    right = [each.index(min(each)) == 0 for each in sums]
    assert results["local_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
