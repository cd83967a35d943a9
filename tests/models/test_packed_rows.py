"""Packed rows give the same numbers as padded ones; samples do not attend to each other, and positions may skip."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Blip2QFormerConfig

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.models import attention
from tinygptv_ds.models.attention import available_backends, choose_backend, unusable_backends
from tinygptv_ds.models.configuration import PHI_2, EvaViTConfig, TinyGPTVConfig
from tinygptv_ds.models.parameters import lora, norms, projections, train_only
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration

IMAGE, QUERIES = 29, 3
ROWS = [[1, 2, IMAGE, IMAGE, IMAGE, 3, 4], [5, 6], [IMAGE, IMAGE, IMAGE, 7, 8, 9, 10, 11, 12]]


@pytest.fixture(params=[0.0, 0.3], ids=["plain", "dropout"])
def model(request: pytest.FixtureRequest) -> TinyGPTVForConditionalGeneration:
    torch.manual_seed(0)
    config = TinyGPTVConfig(
        vision_config=EvaViTConfig(28, 14, 16, 2, 2, 24),
        qformer_config=Blip2QFormerConfig(
            hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, encoder_hidden_size=16
        ),
        text_config=PHI_2
        | {
            "vocab_size": 30,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "resid_pdrop": request.param,
        },
        num_query_tokens=QUERIES,
        proj_hidden_size=8,
        lora_r=2,
        lora_dropout=request.param,
    )
    model = TinyGPTVForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    train_only(model, projections, norms, lora)
    return model.train()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def keys(first: int, positions: Tensor) -> Tensor:
    """Return the keys of dropout of a row, which is known by its first token."""
    drawn = torch.randint(-(2**62), 2**62, (len(ROWS[0]) + 5,), generator=torch.Generator().manual_seed(first))
    return drawn[positions]


def packed(rows: list[list[int]]) -> dict:
    """Pack rows so that every token except a row's first is a target."""
    flat = torch.tensor([token for row in rows for token in row])
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0)
    starts = set(ends[:-1].tolist())
    targets = [t for t in range(1, len(flat)) if t not in starts]
    return {
        "input_ids": flat,
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows]),
        "dropout_keys": torch.cat([keys(row[0], torch.arange(len(row))) for row in rows]),
        "cu_seqlens": ends.int(),
        "max_seqlen": max(map(len, rows)),
        "image_rows": (flat == IMAGE).nonzero().squeeze(1),
        "target_rows": torch.tensor(targets) - 1,
        "targets": flat[targets],
    }


def padded_losses(model: TinyGPTVForConditionalGeneration, pixels: Tensor) -> list[Tensor]:
    longest = max(map(len, ROWS))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ROWS])
    drops = torch.stack([keys(row[0], torch.arange(longest)) for row in ROWS])
    logits = model(ids, pixel_values=pixels, attention_mask=mask, dropout_keys=drops).logits
    return [
        F.cross_entropy(logits[i, : len(row) - 1], torch.tensor(row[1:]), reduction="none")
        for i, row in enumerate(ROWS)
    ]


def test_packed_and_padded_agree(model: TinyGPTVForConditionalGeneration, pixels: Tensor) -> None:
    out = model(pixel_values=pixels, **packed(ROWS))
    expected = torch.cat(padded_losses(model, pixels))
    torch.testing.assert_close(out.token_losses, expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(out.token_losses.sum(), trained(model))
    theirs = torch.autograd.grad(expected.sum(), trained(model))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def trained(model: TinyGPTVForConditionalGeneration) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def test_samples_do_not_see_each_other(model: TinyGPTVForConditionalGeneration, pixels: Tensor) -> None:
    whole = model(pixel_values=pixels, **packed(ROWS)).token_losses
    alone = [
        model(pixel_values=images, **packed([row])).token_losses
        for row, images in zip(ROWS, (pixels[:1], None, pixels[1:]), strict=True)
    ]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_a_skipped_position_is_a_token_nobody_attends_to(model: TinyGPTVForConditionalGeneration) -> None:
    """The original masks such a token; omitting it and skipping its position is equivalent."""
    row, hole = [1, 2, 3, 4, 5, 6], 3
    mask = torch.ones(1, len(row), dtype=torch.long)
    mask[0, hole] = 0
    every = torch.arange(len(row))
    drops = keys(row[0], every)
    logits = model(torch.tensor([row]), attention_mask=mask, position_ids=every[None], dropout_keys=drops[None]).logits[
        0
    ]
    inputs = packed([row[:hole] + row[hole + 1 :]])
    inputs["position_ids"] = torch.tensor([i for i in range(len(row)) if i != hole])
    inputs["dropout_keys"] = drops[inputs["position_ids"]]
    kept = logits[inputs["position_ids"]]
    expected = F.cross_entropy(kept[:-1], inputs["targets"], reduction="none")
    torch.testing.assert_close(model(**inputs).token_losses, expected, rtol=1e-5, atol=1e-5)
    inputs["position_ids"] = torch.arange(len(row) - 1)
    assert not torch.allclose(model(**inputs).token_losses, expected, rtol=1e-5, atol=1e-5)


def test_some_rows_of_an_image(model: TinyGPTVForConditionalGeneration, pixels: Tensor) -> None:
    """A prompt truncated within an image keeps the image's first rows, and the next image is not shifted."""
    inputs = packed([[IMAGE, IMAGE, 7, 8], [IMAGE, IMAGE, IMAGE, 9]])
    index = torch.tensor([0, 1, 3, 4, 5])
    cut = model(pixel_values=pixels, image_index=index, **inputs).token_losses
    second = model(pixel_values=pixels[1:], **packed([[IMAGE, IMAGE, IMAGE, 9]])).token_losses
    torch.testing.assert_close(cut[3:], second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("always_run_vision", [False, True])
def test_without_a_image_projections_get_a_zero(
    model: TinyGPTVForConditionalGeneration, always_run_vision: bool
) -> None:
    model.always_run_vision = always_run_vision
    out = model(**packed([[1, 2, 3]]))
    assert out.anchor.item() == 0
    (out.token_losses.sum() + out.anchor).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name
        assert not projections(name) or not parameter.grad.any(), name


def test_features_instead_of_pixels(model: TinyGPTVForConditionalGeneration, pixels: Tensor) -> None:
    features = model.encode_vision(pixels)
    assert not features.requires_grad
    ours = model(image_features=features, **packed(ROWS)).token_losses
    assert torch.equal(ours, model(pixel_values=pixels, **packed(ROWS)).token_losses)


def test_recomputed_blocks_give_the_same_gradients(model: TinyGPTVForConditionalGeneration, pixels: Tensor) -> None:
    plain = torch.autograd.grad(model(pixel_values=pixels, **packed(ROWS)).token_losses.sum(), trained(model))
    model.gradient_checkpointing_enable()
    assert model.language_model.model.gradient_checkpointing
    state = torch.get_rng_state()
    again = torch.autograd.grad(model(pixel_values=pixels, **packed(ROWS)).token_losses.sum(), trained(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(plain, again, strict=True))


def test_generation_uses_the_cache_rightly(model: TinyGPTVForConditionalGeneration, pixels: Tensor) -> None:
    """Greedy tokens with a cache equal those of full forward passes without one, in a left-padded batch."""
    model.eval()
    lengths: list[int] = []
    first = model.language_model.model.layers[0]
    hook = first.register_forward_hook(lambda _m, inputs, _o: lengths.append(inputs[0].shape[1]))
    prompts = [[1, 2, IMAGE, IMAGE, IMAGE, 3], [0, 0, IMAGE, IMAGE, IMAGE, 4]]
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    kwargs = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    out = model.generate(input_ids=torch.tensor(prompts), attention_mask=mask, pixel_values=pixels, **kwargs)
    hook.remove()
    assert lengths == [6, 1, 1, 1, 1]  # the prompt once, then the new token alone
    for i, prompt in enumerate([prompts[0], prompts[1][2:]]):
        ids = torch.tensor([prompt])
        for _ in range(5):
            logits = model(ids, pixel_values=pixels[i : i + 1]).logits[0, -1]
            logits[0] = -torch.inf  # the end token, kept away by min_new_tokens
            ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
        assert out[i, 6:].tolist() == ids[0, len(prompt) :].tolist()


def test_what_models_of_transformers_return(model: TinyGPTVForConditionalGeneration, pixels: Tensor) -> None:
    """A loss for labels, hidden states, tuples; what is not known is an error."""
    model.eval()
    ids = torch.tensor([ROWS[0]])
    labels = ids.clone()
    labels[:, :-3] = -100
    output = model(ids, pixel_values=pixels[:1], labels=labels, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(output.logits[0, -4:-1], ids[0, -3:])
    assert torch.allclose(output.loss, expected)
    assert torch.allclose(model(ids, pixel_values=pixels[:1], labels=labels, num_items_in_batch=6).loss, expected / 2)
    assert len(output.hidden_states) == 1 + len(model.language_model.model.layers)
    assert torch.equal(output.hidden_states[0], model.embed(ids, pixels[:1]))
    assert torch.equal(model.language_model.lm_head(output.hidden_states[-1]).float(), output.logits)
    assert model(ids, pixel_values=pixels[:1]).hidden_states is None
    as_tuple = model(ids, pixel_values=pixels[:1], labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)
    with pytest.raises(TypeError, match="pixel_value"):
        model(ids, pixel_value=pixels[:1])
    with pytest.raises(ValueError, match=r"'sdpa' computes no attention weights; .*set_attn_implementation"):
        model(ids, pixel_values=pixels[:1], output_attentions=True)
    with pytest.raises(ValueError, match=r"labels are \[1, 2\]"):
        model(ids, pixel_values=pixels[:1], labels=labels[:, :2])
    grown = model.resize_token_embeddings(40, mean_resizing=False)
    assert grown.weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 40


@pytest.mark.parametrize("images", [1, 3])
def test_images_without_places_are_no_silent_loss(
    model: TinyGPTVForConditionalGeneration, pixels: Tensor, images: int
) -> None:
    ids = torch.tensor([[1, *[IMAGE] * QUERIES, 2, *[IMAGE] * QUERIES, 3]])
    given = torch.cat([pixels, pixels])[:images]
    with pytest.raises(ValueError, match=f"give {images * QUERIES} rows, but input_ids has {2 * QUERIES} places"):
        model(ids, pixel_values=given)


def test_the_frozen_vision_path_stays_in_evaluation(model: TinyGPTVForConditionalGeneration) -> None:
    model.train()
    assert model.language_model.training
    assert not any(m.training for part in (model.visual_encoder, model.qformer) for m in part.modules())


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Set the compute capability and the installed packages: the content of each, or the error of its import."""

    def install(capability: tuple[int, int], **packages: object) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        real_find, real_import = importlib.util.find_spec, importlib.import_module
        ours = ("flash_attn", "flash_attn_interface")

        def find(name: str) -> object:
            return packages.get(name) if name in ours else real_find(name)

        def load(name: str) -> object:
            found = packages[name] if name in ours else real_import(name)
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(attention.importlib.util, "find_spec", find)
        monkeypatch.setattr(attention.importlib, "import_module", load)
        attention._found.cache_clear()

    yield install
    attention._found.cache_clear()


FLASH = SimpleNamespace(flash_attn_varlen_func=len)


@pytest.mark.parametrize(
    ("capability", "packages", "found"),
    [
        ((7, 5), {"flash_attn": FLASH}, ["sdpa"]),
        ((8, 0), {}, ["torch_varlen", "sdpa"]),
        ((8, 0), {"flash_attn": FLASH, "flash_attn_interface": FLASH}, ["flash_attn", "torch_varlen", "sdpa"]),
        ((9, 0), {"flash_attn_interface": FLASH}, ["flash_attn_3", "torch_varlen", "sdpa"]),
        ((10, 0), {"flash_attn_interface": FLASH}, ["torch_varlen", "sdpa"]),
    ],
)
def test_backends_by_gpu(fake_gpu, capability: tuple[int, int], packages: dict, found: list[str]) -> None:
    """A V100 or T4, for which fp16 is meant, has no flash-attention kernels; FlashAttention 3 is for Hopper."""
    fake_gpu(capability, **packages)
    assert available_backends("cuda", torch.float16) == found
    assert available_backends("cuda", torch.float32) == ["sdpa"]


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        (ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E"), "undefined symbol"),
        (OSError("libcudart.so.12: cannot open shared object file"), "libcudart"),
        (SimpleNamespace(cute=None), "flash_attn_varlen_func"),  # flash-attn 4 alone
    ],
)
def test_a_flash_attn_that_cannot_be_imported(fake_gpu, package: object, reason: str) -> None:
    """Not taken by "auto", and an error with the reason where it is asked for."""
    fake_gpu((9, 0), flash_attn=package)
    assert choose_backend("auto", "cuda", torch.bfloat16) == "torch_varlen"
    assert reason in unusable_backends("cuda", torch.bfloat16)["flash_attn"]
    with pytest.raises(ConfigError, match=rf"'flash_attn' is installed but cannot be imported \(.*{reason}"):
        choose_backend("flash_attn", "cuda", torch.bfloat16)


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface"])
def test_flash_attention_is_called_as_it_expects(fake_gpu, name: str) -> None:
    """Packed rows, causal; versions of FlashAttention 3 that return more than the output are read."""
    q, cu = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)

    def attend(q, k, v, cu_q, cu_k, longest_q, longest_k, causal):
        assert causal and (longest_q, longest_k) == (3, 3)
        assert cu_q is cu_k is cu
        return (q + k + v, None) if name == "flash_attn_interface" else q + k + v

    fake_gpu((9, 0), **{name: SimpleNamespace(flash_attn_varlen_func=attend)})
    backend = choose_backend("auto", "cuda", torch.bfloat16)
    assert torch.equal(attention.varlen_attention(q, q, q, attention.make_layout(cu, 3, 5, backend)), 3 * q)


def test_back_ends() -> None:
    assert available_backends("cpu", torch.float32) == ["sdpa"]
    assert choose_backend("auto", "cpu", torch.bfloat16) == "sdpa"
    with pytest.raises(ConfigError, match=r"'flash_attn' cannot run on cpu"):
        choose_backend("flash_attn", "cpu", torch.float32)
