"""The card of an exported model: metadata that the Hub reads, and a snippet that runs as pasted."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.alone import run_alone
from helpers.verbs import call
from huggingface_hub import ModelCard
from PIL import Image

from tinygptv_ds.config.recipe import ModelSection
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.weights.export import export as verb
from tinygptv_ds.weights.export.model_card import _base_models


def card_of(run: Path, out: Path, *options: object) -> ModelCard:
    call(verb, run, "--out", out, "--dtype", "fp32", *options)
    return ModelCard.load(out / "README.md")


def test_metadata(run: Path, tmp_path: Path) -> None:
    result = {"benchmark": "gqa", "strict": 41.5, "compat": 40, "questions": 40, "step": 3, "predictions": []}
    (tmp_path / "mine.json").write_text(json.dumps(result))
    data = card_of(run, tmp_path / "out", "--scores", tmp_path / "mine.json").data
    assert (data.license, data.language, data.library_name) == ("bsd-3-clause", ["en"], "transformers")
    assert (data.pipeline_tag, data.datasets) == ("image-text-to-text", ["x"])
    assert "tinygptv" in data.tags and "custom_code" in data.tags
    assert data.metrics == ["compat", "strict"]
    found = {each.metric_type: (each.dataset_name, each.dataset_type, each.metric_value) for each in data.eval_results}
    assert found == {"strict": ("mine", "gqa", 41.5), "compat": ("mine", "gqa", 40)}
    assert {each.task_type for each in data.eval_results} == {"visual-question-answering"}
    assert "base_model" not in data.to_dict(), "these sizes are not those of the published models"


def test_the_published_base_models() -> None:
    assert _base_models(TinyGPTVConfig()) == ["microsoft/phi-2", "Salesforce/blip2-flan-t5-xxl"]


def test_another_license_and_no_scores(run: Path, tmp_path: Path) -> None:
    data = card_of(run, tmp_path / "out", "--license", "mit").data
    assert data.license == "mit"
    assert data.eval_results is None


@pytest.mark.parametrize(("step", "found"), [(1, True), (2, False)], ids=["last", "other"])
def test_scores_of_the_run(
    run: Path, base: Callable[..., ModelSection], tmp_path: Path, step: int, found: bool
) -> None:
    """What the run has written after its last step, and nothing of an earlier one."""
    provenance = json.loads((run / "model/provenance.json").read_text())
    provenance["recipe"]["train"] |= {"steps_per_epoch": 1, "epochs": 1, "cycles": 1}
    (run / "model/provenance.json").write_text(json.dumps(provenance))
    folder = run / f"evaluation/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "refcoco.json").write_text(json.dumps({"benchmark": "refcoco", "strict": 10.0}))
    results = card_of(run, tmp_path / "out").data.eval_results
    assert [(each.dataset_name, each.task_type) for each in results or []] == (
        [("refcoco", "image-text-to-text")] if found else []
    )


def test_the_snippet_runs_as_pasted_and_the_pipeline_takes_messages(run: Path, tmp_path: Path) -> None:
    """Where this package cannot be imported; the pipeline's answer is that of `generate`, without the end symbol.

    The snippet runs first, next to the folder, with an image of the name that it gives.
    """
    card = card_of(run, tmp_path / "out")
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.S)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "image.jpg")
    script = """
print("the snippet has ended")
from PIL import Image
from transformers import pipeline
pipe = pipeline("image-text-to-text", model="out", trust_remote_code=True)
image = {"type": "image", "image": Image.new("RGB", (30, 20), "red")}
messages = [{"role": "user", "content": [image, {"type": "text", "text": "w1 w2"}]}]
answer = pipe(text=messages, max_new_tokens=4)[0]["generated_text"][-1]
inputs = pipe.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
tokens = pipe.model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
assert answer["role"] == "assistant"
assert answer["content"].strip() == pipe.processor.answers(tokens)[0], answer
print(len(pipe(images=image["image"], text=pipe.processor.prompt("w1"), max_new_tokens=4)))
"""
    answered, _, pipeline = run_alone(snippet + script, tmp_path).rpartition("the snippet has ended\n")
    assert answered.endswith("\n") and pipeline.strip() == "1"
