"""The four stages one after the other, the second through the DeepSpeed launcher, in fp32 and in bf16."""

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.forked import Ranks, ended
from helpers.launcher import ROOT, Run, deepspeed_form, run
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tinygptv_ds.board_tags import board_tag
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.train.callbacks.sample_panel import cell

STEPS = 4
PROJECTIONS = {f"llama_proj{n}.{part}" for n in ("", "2") for part in ("weight", "bias")}
BLOCK_NORMS = ("input_layernorm", "post_layernorm", "self_attn.q_layernorm", "self_attn.k_layernorm")
NORMS = {f"language_model.model.layers.{i}.{norm}.weight" for i in range(2) for norm in BLOCK_NORMS}
NORMS.add("language_model.model.final_layernorm.weight")
LORA = {
    f"language_model.model.layers.{i}.self_attn.{layer}.lora_{part}.weight"
    for i in range(2)
    for layer in ("query_key_value", "dense")
    for part in "AB"
}
TRAINED = {1: PROJECTIONS | NORMS, 2: PROJECTIONS | NORMS | LORA}
TRAINED |= {3: TRAINED[2], 4: TRAINED[2]}
SCALARS = {
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "train/loss_scale",
    "train/spike",
    "perf/samples_s",
    "perf/target_tokens_s",
    "perf/step_seconds",
    "perf/tflops",
    "perf/data_wait_pct",
    "perf/data_wait_max_pct",
    "perf/slowest_rank",
    "perf/mem_gib",
    "data/skipped",
}
DATASETS = {1: ["caption"], 2: ["caption"], 3: ["caption"], 4: ["vqa", "text", "chat", "pair"]}


@pytest.fixture(scope="module")
def chain(weights: Path, shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run | Ranks]:
    """Train each stage on two ranks from the run directory of the one before.

    The launcher starts the second; the ranks of the others are forked, which takes less time.
    """
    folder = tmp_path_factory.mktemp("chain")
    captions = {"caption": tiny.write_shards(folder / "caption", tiny.samples("caption", 12))}
    runs: dict[int, Run | Ranks] = {}

    def stage(number: int, *sets: str, form: list[str] | None = None, json_file: str = "cpu.json") -> None:
        raw = tiny.recipe(weights, shards if number == 4 else captions, stage=number, train__steps_per_epoch=STEPS)
        before = [f"model.init_from={runs[number - 1].folder}"] if number > 1 else ["model.lora_r=0"]
        options = [option for text in (*before, *sets) for option in ("--set", text)]
        recipe = tiny.write_recipe(folder / f"stage{number}.yaml", raw)
        options.append(f"--deepspeed_config={ROOT}/ds_configs/{json_file}")
        if form is not None:
            runs[number] = run(form, recipe, folder / f"stage{number}", *options)
        else:
            script = f"stages/stage{number}.py"
            runs[number] = ended(recipe, folder / f"stage{number}", *options, script=script, ranks=2)

    bare = ("text.prompt_template=null", r'text.end_sym="\n"')
    asked = ("text.prompts=stage3", "text.prompt_template='###Human: {} ###Assistant: '")
    stage(1, *bare)
    stage(2, *bare, "model.allow_missing=[lora]", "deepspeed.zero_optimization.stage=3", form=deepspeed_form(2))
    stage(3, *asked, json_file="zero2_bf16.json")
    stage(4, "train.sample_every=2", json_file="zero3_bf16.json")
    return runs


def trained(run: Run | Ranks) -> dict[str, Tensor]:
    return load_file(run.folder / "model/trained.safetensors")


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_what_is_trained(stage: int, chain: dict[int, Run | Ranks]) -> None:
    """The stage trains exactly its set of tensors, and moves each from where the stage before had left it."""
    after = trained(chain[stage])
    assert after.keys() == TRAINED[stage]
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in after.values())
    before = trained(chain[stage - 1]) if stage > 1 else {}
    for name in after.keys() & before.keys():
        moved = (after[name] - before[name]).abs().max()
        assert 0 < moved < 2 * STEPS * 3e-3, name  # AdamW moves by about the rate; a fresh start would be far away
    for name in NORMS if stage == 1 else ():
        assert (after[name] != 1).any(), name


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_tensorboard(stage: int, chain: dict[int, Run | Ranks]) -> None:
    events = EventAccumulator(str(chain[stage].folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    kinds = ("train/loss", "data/mix")
    wanted = {board_tag(name) for name in SCALARS | {f"{kind}_{each}" for kind in kinds for each in DATASETS[stage]}}
    assert wanted <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("1_loss/train")] == [1, 2, 3, 4]
    panels = [2, 4] if stage == 4 else [4]
    assert [event.step for event in events.Tensors("8_samples/answers/text_summary")] == panels
    (text,) = events.Tensors("8_samples/answers/text_summary")[-1].tensor_proto.string_val
    rows = text.decode().splitlines()
    assert rows[0] == "| | prompt | true | generated |" and len(rows) == 2 + 2
    assert [event.step for event in events.Images("8_samples/images")] == panels
    kept = chain[stage].folder / "samples"
    assert sorted(kept.glob("*.json")) == [kept / f"step-{step:08d}.json" for step in panels]
    samples = json.loads((kept / "step-00000004.json").read_text())["samples"]
    prompts = [f"| {number} | {cell(each['prompt'])} |" for number, each in enumerate(samples)]
    assert [row[: len(prompt)] for prompt, row in zip(prompts, rows[2:], strict=True)] == prompts
    images = [kept / name for each in samples for name in each["images"]]
    assert sorted((kept / "images").iterdir()) == sorted(set(images)) != []


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_what_a_run_leaves(stage: int, chain: dict[int, Run | Ranks]) -> None:
    done = chain[stage]
    lines = done.metrics
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["train/loss_scale"] == 1.0 and line["train/grad_norm"] > 0 for line in lines)
    assert all(line["perf/samples_s"] > 0 and line["data/skipped"] == 0 for line in lines)
    log = (done.folder / "log.txt").read_text()
    zero, precision = {1: (2, "fp32"), 2: (3, "fp32"), 3: (2, "bf16"), 4: (3, "bf16")}[stage]
    assert f"stage {stage} on 2 rank(s) of cpu, ZeRO-{zero}, {precision}" in log
    assert "attention: sdpa" in log
    for step in range(1, STEPS + 1):
        assert log.count(f"step {step}/{STEPS} | loss ") == 1
        assert done.output.count(f"step {step}/{STEPS} | loss ") == 1  # one rank speaks
    assert "ETA 0:00:00" in log
    assert load_recipe(done.folder / "recipe.yaml").stage == stage
    for file in ("deepspeed.json", "versions.json", "machine.json", "model/config.json", "model/provenance.json"):
        assert (done.folder / file).is_file()
    assert not list(done.folder.rglob("*.partial"))


def test_the_launch_scripts_are_alike() -> None:
    """They differ in the number of the stage alone, so one that starts shows that all of them do."""
    scripts = {(ROOT / f"launch/stage{n}.sh").read_text().replace(f"stage{n}", "stageN") for n in TRAINED}
    assert len(scripts) == 1 and "stageN" in scripts.pop()


def test_the_losses_fall(chain: dict[int, Run | Ranks]) -> None:
    """Captions of six words: four steps of stage 1 and 2 are enough to show."""
    assert chain[2].column("train/loss")[-1] < chain[1].column("train/loss")[0]
    assert "Traceback" not in "".join(done.output for done in chain.values())
