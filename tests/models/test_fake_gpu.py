"""The model at its published widths on a GPU that does not exist: devices, dtypes and waits of every operation."""

from collections.abc import Iterator

import pytest
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from benchmarks.fake_gpu import DEVICE, backward, fake_gpu, fake_model
from benchmarks.gpu.plan import Case
from benchmarks.operations.record import Operation, Recorder
from benchmarks.operations.step import PHI, VISION, RecordedStep, published_config, record_step
from tinygptv_ds.dtypes import DTYPES
from tinygptv_ds.models.configuration import TinyGPTVConfig

VARLEN = {"torch_varlen": "_varlen_attn", "flash_attn": "flash_varlen", "flash_attn_3": "flash_varlen"}


def shallow(stage: int) -> TinyGPTVConfig:
    """The published widths, with few blocks of each kind."""
    config = published_config(stage)
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 2
    config.qformer_config.num_hidden_layers = 3
    return config


def named(operations: list[Operation], name: str, part: str) -> list[Operation]:
    return [each for each in operations if each.name == name and each.part == part]


def check(step: RecordedStep, case: Case, attention: str) -> None:
    """Everything is on the GPU, in the documented dtypes; nothing waits for it; what is trained has its gradient."""
    operations, dtype = step.recorder.operations, DTYPES[case.precision]
    assert {device for each in operations for device in each.devices} == {DEVICE}
    assert step.recorder.host_reads == 0
    products = [each for each in operations if each.is_product or each.is_attention]
    assert all(dtype in each.dtypes for each in products)
    forward = [each for each in products if not each.name.endswith("backward")]  # reads its fp32 log-sum-exps, too
    assert forward and {kind for each in forward for kind in each.dtypes} == {dtype}
    phi_norms = [*named(operations, "native_layer_norm", PHI), *named(operations, "_fused_rms_norm", PHI)]
    assert phi_norms and {kind for each in phi_norms for kind in each.dtypes} == {torch.float32}
    config = step.model.config
    blocks = config.text_config.num_hidden_layers
    name = VARLEN.get(attention, "_scaled_dot_product_flash_attention")
    assert len(named(operations, name, PHI)) == blocks
    assert len(named(operations, name, f"{PHI}, backward")) == blocks * case.recompute
    assert len(named(operations, f"{name}_backward", f"{PHI}, backward")) == blocks
    images = case.source == "pixels"
    qformer = config.qformer_config.num_hidden_layers
    flash = (
        config.vision_config.num_hidden_layers
        + qformer
        + -(-qformer // config.qformer_config.cross_attention_frequency)
    )
    assert len(named(operations, "_scaled_dot_product_flash_attention", VISION)) == flash * images
    assert step.token_losses.dtype == torch.float32 and step.token_losses.shape == (step.targets,)
    for parameter_name, parameter in step.model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, parameter_name
        assert parameter.dtype == torch.float32 or not parameter.requires_grad, parameter_name
        assert parameter.grad is None or parameter.grad.dtype == torch.float32, parameter_name


@pytest.mark.parametrize("attention", ["sdpa", "torch_varlen", "flash_attn", "flash_attn_3"])
@pytest.mark.parametrize(
    "case",
    [
        Case(4, 2, "bf16", "pixels", 2),
        Case(4, 2, "fp16", "features", 2),
        Case(1, 2, "fp16", "pixels", 64),
        Case(4, 2, "bf16", "features", 16, recompute=True),
    ],
    ids=str,
)
def test_a_step(case: Case, attention: str) -> None:
    check(record_step(case, shallow(case.stage), attention), case, attention)


def test_a_step_of_the_published_size() -> None:
    case = Case(4, 2, "bf16", "pixels", 2)
    check(record_step(case), case, "torch_varlen")


@pytest.mark.parametrize(("precision", "with_autocast"), [("bf16", False), ("fp16", False), ("bf16", True)])
def test_generation(precision: str, with_autocast: bool) -> None:
    """The host reads one value: the number of image positions of the prompt, which must be that of the images' rows."""
    config, dtype = shallow(4), DTYPES[precision]
    queries, rows = config.num_query_tokens, 2
    length = queries + 9
    recorder = Recorder(values=(float(rows * queries),))
    with fake_gpu(), torch.no_grad():
        model = fake_model(config, dtype, torch.float32 if with_autocast else dtype).eval()
        ids = torch.zeros(rows, length, dtype=torch.long, device=DEVICE)
        mask = torch.ones(rows, length + 2, dtype=torch.long, device=DEVICE)
        size = config.vision_config.image_size
        pixels = torch.zeros(rows, 3, size, size, dtype=torch.uint8, device=DEVICE)
        cache = DynamicCache(config=config.text_config)
        with recorder, torch.autocast(DEVICE, dtype, enabled=with_autocast):
            prompt = {"attention_mask": mask[:, :length], "cache": cache, "use_cache": True, "logits_to_keep": 1}
            logits = [model(ids, pixel_values=pixels, **prompt).logits]
            for new in (1, 2):
                step = {"attention_mask": mask[:, : length + new], "cache": cache, "use_cache": True}
                logits.append(model(ids[:, :1], **step, logits_to_keep=1).logits)
    assert recorder.host_reads == 1
    assert {device for each in recorder.operations for device in each.devices} == {DEVICE}
    products = [each for each in recorder.operations if each.is_product or each.is_attention]
    assert products and {kind for each in products for kind in each.dtypes} == {dtype}
    assert cache.get_seq_length() == length + 2
    for each in logits:
        assert (each.dtype, each.device.type) == (torch.float32, DEVICE)
        assert each.shape == (rows, 1, config.text_config.vocab_size)


def test_what_waits_or_runs_elsewhere_is_found() -> None:
    """A value that the host reads is an error, and an operation on the CPU is recorded as one."""
    with fake_gpu():
        value = torch.ones(3, device=DEVICE)
        with Recorder(), pytest.raises(RuntimeError, match="the host reads a value"):
            value.sum().item()
        with Recorder(), pytest.raises(Exception, match="nonzero"):
            value.nonzero()
        with Recorder() as recorder:
            torch.ones(3, device="cpu").add(1)
    assert "cpu" in {device for each in recorder.operations for device in each.devices}


@pytest.fixture
def small_model() -> Iterator[tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    yield nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8)), torch.randn(5, 4)


def test_gradients_are_those_of_torch(small_model: tuple[nn.Module, Tensor]) -> None:
    """Our walk through the graph sums, casts and shapes gradients as torch's engine does."""
    model, x = small_model
    scale = nn.Parameter(torch.ones(8, dtype=torch.float64))
    parameters = [*model.parameters(), scale]

    def loss() -> Tensor:
        hidden = model(x)
        return ((hidden * scale + hidden[:, :1]) ** 2).sum() + hidden.sum()

    loss().backward()
    wanted = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    backward(loss())
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)


def test_parts_on_three_gpus() -> None:
    """As `device_map` places them: a hook moves what a module is given to the module's device."""
    config = shallow(4)
    places = {"visual_encoder": 0, "ln_vision": 0, "qformer": 0, "llama_proj": 0, "llama_proj2": 1}
    phi = {"model.embed_tokens": 1, "model.layers.0": 1, "model.layers.1": 2, "model.final_layernorm": 2, "lm_head": 2}
    with fake_gpu():
        model = fake_model(config, torch.bfloat16, torch.bfloat16).eval()
        for name, number in (places | {f"language_model.{part}": number for part, number in phi.items()}).items():
            for module in model.get_submodule(name).modules():
                _place(module, torch.device("cuda", number))
        model.query_tokens.data = model.query_tokens.data.to("cuda:0")
        ids = torch.zeros(2, 40, dtype=torch.long, device="cuda:0")
        pixels = torch.zeros(2, 3, 448, 448, dtype=torch.uint8, device="cuda:0")
        with torch.no_grad():
            assert model.get_image_features(pixels).device.index == 1
            embeds = model.embed(ids)
            context = {"attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": True}
            output = model(inputs_embeds=embeds.to("cuda:0"), **context)
            assert output.logits.device.index == 2 and output.loss.shape == ()
            assert [layer.keys.device.index for layer in output.cache.layers] == [1, 2]
            step = model(ids[:, :1], attention_mask=torch.ones(2, 41, device="cuda:0").long(), cache=output.cache)
            assert step.logits.device.index == 2 and output.cache.get_seq_length() == 41


def _place(module: nn.Module, device: torch.device) -> None:
    for values in (module._parameters, module._buffers):
        for name, value in values.items():
            if value is not None:
                moved = value.to(device)
                values[name] = nn.Parameter(moved, requires_grad=False) if isinstance(value, nn.Parameter) else moved

    def move(_: nn.Module, args: tuple, kwargs: dict) -> tuple:
        return send_to_device(args, device), send_to_device(kwargs, device)

    module.register_forward_pre_hook(move, with_kwargs=True)
