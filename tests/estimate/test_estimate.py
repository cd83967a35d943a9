"""`estimate`: parameters and operations are the published model's, memory is what torch really keeps."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from helpers.verbs import call
from transformers import Blip2QFormerConfig

from benchmarks.fake_gpu import DEVICE, fake_gpu, fake_model
from tinygptv_ds.charts.axes import short
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.estimate import estimate
from tinygptv_ds.estimate.data_summary import ASSUMED, MeanSample, summarize_data
from tinygptv_ds.estimate.gpus import cards_named
from tinygptv_ds.estimate.memory import MicroBatchSize, phi_row_bytes, step_memory
from tinygptv_ds.estimate.model_size import (
    model_configuration,
    parameter_counts,
    parameter_shapes,
    phi_sizes,
    quantized_weights,
    trained_names,
    trained_parts,
)
from tinygptv_ds.models import dropout
from tinygptv_ds.models.attention import make_layout
from tinygptv_ds.models.configuration import PHI_2, EvaViTConfig, TinyGPTVConfig
from tinygptv_ds.models.flops import FlopRates, PartFlops, flops_by_part
from tinygptv_ds.models.frozen_linear import quantized_buffers
from tinygptv_ds.models.parameters import PARTS, lora, norms, projections, train_only
from tinygptv_ds.models.phi import AttentionContext, rotary_tables
from tinygptv_ds.models.quantized_linear import quantize_layers
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.train.flat_optimizer import FlatOptimizer
from tinygptv_ds.weights.assemble import typed_meta_model

ROOT = Path(__file__).parents[2]
FULL = ROOT / "tests/golden/data/full/trainable_full_size.json"
ALL = ("projections", "norms", "lora")
PUBLISHED = TinyGPTVConfig(lora_r=64)
SHAPES = parameter_shapes(PUBLISHED)
COUNTS = parameter_counts(SHAPES)


def small_model() -> TinyGPTVForConditionalGeneration:
    qformer = Blip2QFormerConfig(
        hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, encoder_hidden_size=16
    )
    text = {"vocab_size": 30, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    return TinyGPTVForConditionalGeneration(
        TinyGPTVConfig(
            vision_config=EvaViTConfig(28, 14, 16, 2, 2, 24),
            qformer_config=qformer,
            text_config=PHI_2 | text,
            num_query_tokens=3,
            proj_hidden_size=8,
            lora_r=2,
        )
    )


def recipe_counts(recipe: Recipe) -> dict[str, int]:
    return parameter_counts(parameter_shapes(model_configuration(recipe, phi_sizes(recipe)[0])))


@pytest.mark.parametrize("stage", [2, 3, 4])
def test_parameters_of_the_published_stages(stage: int) -> None:
    reference = json.loads(FULL.read_text())[f"stage{stage}"]
    recipe = load_recipe(ROOT / f"stages/stage{stage}.yaml")
    counts = recipe_counts(recipe)
    modules = reference["modules"]
    assert sum(counts.values()) == reference["all_parameters"]
    assert counts["vit"] == modules["visual_encoder"] + modules["ln_vision"]
    assert counts["qformer"] == modules["qformer"] + modules["query_tokens"]
    assert (counts["norms"], counts["lora"]) == (reference["by_group"]["norm_weights"], reference["by_group"]["lora"])
    assert sum(counts[part] for part in trained_parts(recipe)) == reference["trainable_total"]


def test_parameters_of_stage_1() -> None:
    recipe = load_recipe(ROOT / "stages/stage1.yaml")
    counts = recipe_counts(recipe)
    assert sum(counts[part] for part in trained_parts(recipe)) == 13_809_664
    assert trained_parts(load_recipe(ROOT / "stages/stage1.yaml", ["model.lora_r=64"])) == ALL


def test_parameters_of_any_sizes() -> None:
    """Part by part they are those of a model in memory."""
    model = small_model()
    named = dict(model.named_parameters())
    counted = dict.fromkeys(PARTS, 0)
    for name, parameter in named.items():
        counted[next(part for part, belongs in PARTS.items() if belongs(name))] += parameter.numel()
    assert counted == parameter_counts(parameter_shapes(model.config))


@pytest.mark.parametrize(
    ("image", "sample", "teraflops"),
    [(224, ASSUMED[2], 1.04), (224, ASSUMED[3], 2.24), (448, ASSUMED[4], 3.63), (448, MeanSample(1, 512, 256), 7.80)],
)
def test_operations(image: int, sample: MeanSample, teraflops: float) -> None:
    """Figures that were worked out by hand from the published shapes."""
    config = TinyGPTVConfig(vision_config={"image_size": image}, lora_r=64)
    parts = flops_by_part(config, trained_names(SHAPES, ALL))
    total = sum(part.forward.of(sample.counts) + part.backward.of(sample.counts) for part in parts.values())
    assert total / 1e12 == pytest.approx(teraflops, rel=0.01)
    assert parts["vit"].backward == parts["qformer"].backward == FlopRates()


def test_operations_follow_what_is_trained() -> None:
    usual = flops_by_part(PUBLISHED, trained_names(SHAPES, ALL))
    recomputed = flops_by_part(PUBLISHED, trained_names(SHAPES, ALL), recomputed=0.5)
    for part in ("phi", "lora"):
        again = recomputed[part].backward.of(ASSUMED[2].counts) - usual[part].backward.of(ASSUMED[2].counts)
        assert again == pytest.approx(0.5 * usual[part].forward.of(ASSUMED[2].counts))
    assert recomputed["vit"] == usual["vit"]
    vit = [flops_by_part(PUBLISHED, trained_names(SHAPES, (*ALL, "vit")), recomputed=n)["vit"] for n in (0.0, 0.5)]
    assert vit[1].backward.image - vit[0].backward.image == pytest.approx(usual["vit"].forward.image)
    cached = flops_by_part(PUBLISHED, trained_names(SHAPES, ALL), from_features=True)
    assert cached["vit"] == cached["qformer"] == PartFlops() and cached["phi"] == usual["phi"]
    query = flops_by_part(PUBLISHED, trained_names(SHAPES, (*ALL, "qformer")))
    assert query["qformer"].backward.image > query["qformer"].forward.image and query["vit"].backward.image == 0
    whole = flops_by_part(PUBLISHED, trained_names(SHAPES, (*ALL, "llm")))
    assert whole["head"].backward.target == 2 * whole["head"].forward.target
    assert usual["head"].backward.target == usual["head"].forward.target


def test_activations_are_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that a block of Phi keeps of a row on a fake GPU, parameters and shared storage apart."""
    monkeypatch.setattr(dropout, "kernel", lambda p, device: dropout._drop_at(p))
    rows, kept, config = 4096, {}, small_model().config

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if len(tensor) == rows or tensor.shape[-1] == rows:  # neither weights nor their copies in bf16
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with fake_gpu():
        model = fake_model(config, torch.bfloat16)
        x = torch.empty(rows, 64, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        positions = torch.empty(rows, dtype=torch.long, device=DEVICE)
        layout = make_layout(positions[:2].int(), rows, rows, "torch_varlen")
        tables = rotary_tables(positions, config.text_config, torch.float32)
        context = AttentionContext(*tables, layout, dropout=dropout.make_keys(positions, 6, 256))
        shared = {tensor.untyped_storage()._cdata for tensor in (*tables, positions)}
        with torch.autocast(DEVICE, torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.language_model.model.layers[1](x, context)
    found = sum(size for storage, size in kept.items() if storage not in shared) / rows
    assert phi_row_bytes(config, ALL) == pytest.approx(found, rel=0.01)


def test_optimizer_and_weights_are_what_torch_holds() -> None:
    model = small_model()
    trained = train_only(model, projections, norms, lora)
    counts = parameter_counts({name: tuple(p.shape) for name, p in model.named_parameters()})
    trainable = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trainable)
    for parameter in trainable:
        parameter.grad = torch.ones_like(parameter)
    adamw.step()
    moments = sum(
        value.nbytes for state in adamw.state.values() for key, value in state.items() if key.startswith("exp_avg")
    )
    whole = sum(p.nbytes if p.requires_grad else p.nbytes / 2 for p in model.parameters())
    found = step_memory(model.config, counts, ALL, MicroBatchSize(1, MeanSample(1, 10, 5)), gpus=1)["ZeRO-2"]
    masters = sum(p.nbytes for p in trainable)
    assert len(trained) == len(trainable)
    assert (found.weights, found.optimizer) == (whole, moments + masters)


def test_one_gpu_holds_flat_tensors() -> None:
    """The weights are views of the flat tensors; a backward pass ends with its own gradients next to the flat ones."""
    model = small_model()
    train_only(model, projections, norms, lora)
    counts = parameter_counts({name: tuple(p.shape) for name, p in model.named_parameters()})
    trainable = [p for p in model.parameters() if p.requires_grad]
    flat = FlatOptimizer([{"params": trainable}], torch.optim.AdamW, 0.0)
    flat.step()
    moments = sum(flat.moment(p, name).nbytes for p in trainable for name in ("exp_avg", "exp_avg_sq"))
    gradients = sum(grad.nbytes for grad in flat.gradients) + sum(p.nbytes for p in trainable)
    whole = sum(p.nbytes if p.requires_grad else p.nbytes / 2 for p in model.parameters())
    batch = MicroBatchSize(1, MeanSample(1, 10, 5))
    found, zero = (step_memory(model.config, counts, ALL, batch, gpus=1, flat=each) for each in (True, False))
    for setting in ("ZeRO-1", "ZeRO-2"):
        held = found[setting]
        assert (held.weights, held.optimizer, held.gradients) == (whole, moments, gradients)
        assert held.total < zero[setting].total
    assert found["ZeRO-3"] == zero["ZeRO-3"]


def test_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The memory of a micro-batch as in the table, below what each card has; a wrong ending is an error."""
    recipe, file = str(ROOT / "stages/stage3.yaml"), tmp_path / "memory.svg"
    options = ("--set", "train.micro_batch_size=2", "--set", "train.batch_size=2", "--gpu", "A100-80GB", "RTX-4090")
    call(estimate, recipe, *options, "--plot", str(file), "--json")
    memory = json.loads(capsys.readouterr().out)["memory"]
    titles = [
        title.text for title in ElementTree.fromstring(file.read_text()).iter("{http://www.w3.org/2000/svg}title")
    ]
    for setting in ("ZeRO-2", "ZeRO-3"):
        assert f"2: activations {short(memory[setting]['activations'] / 2**30)}" in titles
    assert ">A100-80GB<" in file.read_text() and ">RTX-4090<" in file.read_text()
    with pytest.raises(ConfigError, match=r"--plot memory\.png: the name must end in \.svg"):
        call(estimate, recipe, "--plot", "memory.png")


def test_what_is_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing under ZeRO-3 or with quantized weights, by the rule of training; nor is it offered as a remedy there."""
    recipe = str(ROOT / "stages/stage4.yaml")

    def found(*options: str) -> tuple[dict, str]:
        call(estimate, recipe, "--gpu", "H100-80GB", "--json", *options)
        launches = json.loads(capsys.readouterr().out)["launches"]
        call(estimate, recipe, "--gpu", "H100-80GB", *options)
        return launches, capsys.readouterr().out

    usual, text = found()
    eager, without = found("--set", "model.compile=false")
    quantized, in_bits = found("--set", "model.frozen_bits=4", "--set", "train.cuda_graph_tokens=256")
    assert usual["kernels"] < eager["kernels"] == quantized["kernels"]
    casts = 2 * (128 - 1)  # of 128 LoRA weights and of their gradients, which ZeRO does one by one
    assert usual["zero_3_kernels"] == eager["zero_3_kernels"] == eager["kernels"] + casts
    assert f"(compiled blocks; {usual['zero_3_kernels']:,.0f} under ZeRO-3, without)" in text
    assert [launches["compiled"] for launches in (usual, eager, quantized)] == [True, False, False]
    assert ["(model.compile)" in each for each in (text, without, in_bits)] == [False, True, False]
    assert ["train.cuda_graph_tokens" in each for each in (text, without, in_bits)] == [True, True, False]
    zero, _ = found("--set", "train.deepspeed_checkpoints=true")
    assert zero["optimizer"] > usual["optimizer"] and zero["kernels"] == usual["kernels"] + casts


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_are_what_torch_holds(bits: int, vision: bool) -> None:
    """The bytes of a built model, within 1 per cent: a table of 1 KiB in each layer is not counted."""
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8}
    config = TinyGPTVConfig(
        vision_config=EvaViTConfig(28, 14, 512, 3, 2, 2048), text_config=PHI_2 | text, lora_r=8, proj_hidden_size=64
    )
    shapes = parameter_shapes(config)
    model = typed_meta_model(config, torch.bfloat16)
    quantize_layers(model, bits, vision=vision)
    train_only(model, projections, norms, lora)
    held = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in quantized_buffers(model).values())
    batch = MicroBatchSize(1, MeanSample(1, 10, 5))
    quantized = quantized_weights(shapes, bits, vision=vision)
    found = step_memory(config, parameter_counts(shapes), ALL, batch, 1, quantized)
    assert found["ZeRO-2"].weights == pytest.approx(held, rel=0.01)
    whole = step_memory(config, parameter_counts(shapes), ALL, batch, 1)["ZeRO-2"]
    assert found["ZeRO-2"].weights < whole.weights and found["ZeRO-2"].optimizer == whole.optimizer
    assert set(found) == {"ZeRO-1", "ZeRO-2"}


def test_published_weights_in_4_bit(capsys: pytest.CaptureFixture[str]) -> None:
    call(
        estimate,
        str(ROOT / "stages/stage4.yaml"),
        "--gpus",
        "2",
        "--set",
        "train.batch_size=4",
        "--set",
        "model.frozen_bits=4",
    )
    text = capsys.readouterr().out
    assert "2,516,582,400 frozen in 4 bit (0.516 bytes each)" in text
    assert "ZeRO-2" in text and "ZeRO-3" not in text


def test_zero_divides() -> None:
    batch = MicroBatchSize(8, ASSUMED[2])
    one, eight = (step_memory(PUBLISHED, COUNTS, ALL, batch, gpus) for gpus in (1, 8))
    assert eight["ZeRO-2"].optimizer == one["ZeRO-2"].optimizer / 8
    assert eight["ZeRO-1"].gradients == one["ZeRO-1"].gradients
    assert eight["ZeRO-3"].weights < one["ZeRO-3"].weights / 4
    assert eight["ZeRO-3 + CPU offload"].optimizer == 0
    again = step_memory(PUBLISHED, COUNTS, ALL, MicroBatchSize(8, ASSUMED[2], recomputed=1.0), 1)
    assert again["ZeRO-2"].activations < one["ZeRO-2"].activations / 5
    with_vit = [
        step_memory(PUBLISHED, COUNTS, (*ALL, "vit"), MicroBatchSize(8, ASSUMED[2], recomputed=share), 1)["ZeRO-2"]
        for share in (0.0, 1.0)
    ]
    of_vit = 39 * 8 * 257 * 1408 * (34 - 4) - 8 * 257 * 1408 * 34  # blocks, images, rows, width; one block is whole
    saved = with_vit[0].activations - with_vit[1].activations
    assert saved == pytest.approx(one["ZeRO-2"].activations - again["ZeRO-2"].activations + of_vit, rel=0.02)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "stages/stage4.yaml")
    call(estimate, recipe, "--gpu", "rtx-3090", "h100-80gb")
    text = capsys.readouterr().out
    assert "45,266,944 trained" in text and "RTX-3090" in text and "A100" not in text and "3.63 TFLOP a sample" in text
    call(
        estimate,
        recipe,
        "--json",
        "--gpus",
        "2",
        "--set",
        "train.micro_batch_size=1",
        "--tokens",
        "512",
        "--targets",
        256,
        "--launch-us",
        0,
    )
    found = json.loads(capsys.readouterr().out)
    assert found["sample_operations"] / 1e12 == pytest.approx(7.80, rel=0.01)
    assert found["speed"]["H100-80GB"]["own"]["samples_per_second"] == pytest.approx(2 * 0.4 * 989 / 7.80, rel=0.01)
    assert "RTX-3090" in found["memory"]["ZeRO-2"]["fits"]
    assert found["disk"]["checkpoint"] == 12 * 45_266_944


def test_a_batch_too_small_for_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    """Stage 4 as published leaves an H100 idle and keeps an RTX 3090 busy; larger micro-batches help."""
    recipe, cards = str(ROOT / "stages/stage4.yaml"), ["--gpu", "RTX-3090", "H100-80GB"]
    call(estimate, recipe, *cards)
    text = capsys.readouterr().out
    (remedy,) = [line for line in text.splitlines() if "the GPU waits for the host" in line]
    assert "(H100-80GB)" in remedy and "train.micro_batch_size" in remedy and "data.features" in remedy
    assert "train.cuda_graph_tokens" in remedy
    call(estimate, recipe, "--gpus", "2", "--set", "train.micro_batch_size=1", *cards)
    (remedy,) = [line for line in capsys.readouterr().out.splitlines() if "the GPU waits for the host" in line]
    assert "train.micro_batch_size" in remedy and "train.cuda_graph_tokens" not in remedy
    call(estimate, recipe, "--json", *cards)
    plain = json.loads(capsys.readouterr().out)
    small, large = plain["speed"]["RTX-3090"], plain["speed"]["H100-80GB"]
    assert not small["own"]["launch_bound"] and small["own"]["mfu"] == pytest.approx(0.4)
    launching = 12e-6 * (plain["launches"]["kernels"] + plain["launches"]["optimizer"])
    assert large["own"]["launch_bound"] and large["step_seconds"] == pytest.approx(launching)
    assert large["own"]["samples_per_second"] == pytest.approx(2 / launching)
    computing = 2 * 3.63 / (0.4 * 989)
    assert large["own"]["mfu"] == pytest.approx(0.4 * computing / launching, rel=0.01)
    full = large["full"]
    assert full["micro_batch"] == pytest.approx(2 * launching / computing, abs=1) and large["full_fits"]
    assert full["mfu"] == pytest.approx(0.4) and not full["launch_bound"]
    call(estimate, recipe, "--gpu", "RTX-3090", "--launch-us", "4000")
    assert "which do not fit: " in capsys.readouterr().out


def test_communication(capsys: pytest.CaptureFixture[str]) -> None:
    """Over a slow link ZeRO-3 waits longer than it computes, and ZeRO-2 does not; one GPU sends nothing."""
    recipe, cards = str(ROOT / "stages/stage2.yaml"), ["--gpu", "A100-80GB", "H100-80GB"]
    many = ["--gpus", 64, "--set", "train.batch_size=4096", *cards]
    call(estimate, recipe, *many, "--link", "100gb/s", "40")
    text = capsys.readouterr().out
    assert "A100-80GB: ZeRO-3 is the wrong choice over 100Gb/s; take ZeRO-2, which fits" in text
    assert "ZeRO-2 93/98   ZeRO-3 35/63   ZeRO-3 + hpZ 89/92" in text
    call(estimate, recipe, "--json", *many, "--link", "10")
    sent = json.loads(capsys.readouterr().out)["sent"]["ZeRO-2"]
    assert sent["across"] == pytest.approx(63 / 64 * 3 * 4 * 45_266_944, rel=1e-3)
    assert sent["seconds"]["10GB/s"] == pytest.approx(sent["across"] / 10e9)
    call(estimate, recipe, *cards)
    assert "one GPU sends nothing" in capsys.readouterr().out


def test_the_whole_phi_needs_more_than_a_small_card() -> None:
    recipe = load_recipe(ROOT / "stages/stage4.yaml", ["model.train=[projections, lora, llm]"])
    assert trained_parts(recipe) == ("projections", "norms", "lora", "llm")
    found = estimate.estimate(recipe, cards_named(["all"]), gpus=1, mfu=0.4, data=summarize_data(recipe))
    plain = estimate.as_plain(found, cards_named(["all"]), [])
    assert plain["memory"]["ZeRO-2"]["fits"] == ["A100-80GB", "H100-80GB", "H200-141GB"]
    assert "RTX-3090" in plain["memory"]["ZeRO-3 + CPU offload"]["fits"]


def test_lengths_of_local_data(recipe_file: Callable[..., Path]) -> None:
    recipe = load_recipe(recipe_file())
    data = summarize_data(recipe)
    assert data.source.startswith("measured") and data.samples == 48
    assert 0.5 < data.sample.images < 1.5 and 0 < data.sample.targets < data.sample.tokens
    sizes, source = phi_sizes(recipe)
    assert (sizes["hidden_size"], sizes["num_hidden_layers"]) == (32, 2) and "config.json" in source
    assert model_configuration(recipe, sizes).text_config.hidden_size == 32


@pytest.mark.parametrize("damage", ['{"hidden_size": 32}', '{"hidden_size": "32"}', "[]", "{"])
def test_a_damaged_config_of_phi(damage: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(damage)
    recipe = load_recipe(ROOT / "stages/stage4.yaml", [f"model.phi={tmp_path}"])
    with pytest.raises(ConfigError, match=r"config\.json"):
        phi_sizes(recipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "H100"], "--gpu H100: unknown card; did you mean H100-80GB?"),
        (["--gpus", "0"], "--gpus and --node must be at least 1"),
        (["--gpus", "3"], "does not divide into micro-batches of 2 on 3 rank"),
        (["--mfu", "1.2"], "--mfu above 0"),
        (["--node", "0"], "--gpus and --node must be at least 1"),
        (["--launch-us", "-1"], "--launch-us must be at least 0"),
        (["--link", "NVLnk"], "neither a number of GB/s nor one of NVLink, "),
        (["--link", "-1"], "--link -1: neither"),
        (["--targets", "500"], "targets are some of the tokens"),
    ],
)
def test_mistakes(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call(estimate, str(ROOT / "stages/stage4.yaml"), *options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gpus 3", "does not divide into micro-batches"),
        ("--set model.phii=x", "model.phii"),
        ("--gpu H10", "--gpu H10"),
    ],
)
def test_mistakes_are_reported_before_torch_is_imported(options: str, message: str) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from tinygptv_ds.cli import main; "
        f"main(['estimate', 'stages/stage4.yaml', *{options.split()!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
