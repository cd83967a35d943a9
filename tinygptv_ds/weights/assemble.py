"""The model of a recipe: sizes from the files, base weights, trained weights, and initial values for the rest.

Names and shapes are all checked before a weight is read. Every parameter and buffer is then loaded or, if it is of a
kind that no file has yet, initialized explicitly; none keeps uninitialized memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PhiConfig, PreTrainedTokenizerBase

from tinygptv_ds.config.recipe import ModelSection, TextSection
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.log import LOGGER
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.eva_vit import KEY_BIAS
from tinygptv_ds.models.fp8_linear import use_fp8
from tinygptv_ds.models.frozen_linear import FrozenLinear, quantized_buffers
from tinygptv_ds.models.lora import LoRALinear
from tinygptv_ds.models.parameters import PARTS, Part, always_fp32, lora, projections, vision
from tinygptv_ds.models.quantized_linear import quantize_layers
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights.io import Stored, in_memory, listing
from tinygptv_ds.weights.layouts.blip2 import blip2_source, qformer_config
from tinygptv_ds.weights.layouts.eva import eva_config, eva_source
from tinygptv_ds.weights.layouts.phi2 import ADDED_NORMS, in_layer, phi_config, phi_source
from tinygptv_ds.weights.other_files import other_file
from tinygptv_ds.weights.source import Source, check_weights, copy_weights
from tinygptv_ds.weights.trained import fitting_source


def build_model(
    section: ModelSection, text: TextSection, *, frozen_dtype: torch.dtype
) -> TinyGPTVForConditionalGeneration:
    """Build the model of a recipe on the CPU with all its weights.

    Projections and LoRA that no file supplies take their initial values from torch's generator: seed it first.

    Args:
        section: the paths of the weights, and what is built around them.
        text: template and end symbol, noted in the model's configuration.
        frozen_dtype: of all frozen weights that are not quantized (`section.frozen_bits`, `fp8`); projections, Phi's
            norms, LoRA and what `section.train` names are fp32.

    Raises:
        WeightsError: a file is missing or damaged, or does not fit name for name and shape for shape.
    """
    config = model_config(section, text)
    trained = None
    if section.init_from is not None:
        trained = fitting_source(
            meta_model(config), Path(section.init_from), section.allow_missing, base=Path(section.phi)
        )
    parts = [PARTS[name] for name in section.train or ()]
    model = assemble(
        config, base_paths(section), trained, frozen_dtype=frozen_dtype, trainable=parts, quantization=section
    )
    model.attention = section.attention
    model.language_model.model.gradient_checkpointing = section.gradient_checkpointing
    model.recompute_vit = bool(section.gradient_checkpointing)
    return model


def build_vision(
    section: ModelSection, text: TextSection, *, frozen_dtype: torch.dtype
) -> TinyGPTVForConditionalGeneration:
    """Build ViT and Q-Former alone, for `encode_vision`; nothing else takes memory or is read.

    All files are checked as in `build_model`, and the weights are those that it takes: a Q-Former in `init_from`
    replaces that of the base. The ViT is quantized as in training.
    """
    config = model_config(section, text)
    model = meta_model(config).to(frozen_dtype)  # type: ignore[arg-type]  # transformers' decorator hides the signature
    trained = None
    if section.init_from is not None:
        trained = fitting_source(model, Path(section.init_from), section.allow_missing, base=Path(section.phi))
    sources = _sources(_shapes(model), config, base_paths(section), trained)
    model.language_model = model.llama_proj = model.llama_proj2 = None
    quantized = _quantize(model, section)
    model.to_empty(device="cpu")
    weights = {name: stored for source in sources for name, stored in source.weights.items() if vision(name)}
    _load(model, quantized, weights)
    _zero_buffers(model)
    return model.requires_grad_(False).eval()


def model_config(section: ModelSection, text: TextSection) -> TinyGPTVConfig:
    """Return the model's sizes, from Phi's config.json, the shapes in the files, and the recipe for the rest.

    Raises:
        WeightsError: a file is missing, unreadable or of another model, or the parts do not fit together.
    """
    blip2 = blip2_source(Path(section.qformer))
    qformer = qformer_config(blip2, section.qformer_heads)
    vision = eva_config(
        Path(section.eva_vit),
        image_size=section.image_size,
        depth=section.eva_vit_depth,
        heads=section.eva_vit_heads,
    )
    if vision.hidden_size != qformer.encoder_hidden_size:
        raise WeightsError(
            f"{section.eva_vit} is {vision.hidden_size} wide, but the Q-Former of {section.qformer} reads "
            f"features of {qformer.encoder_hidden_size}; model.eva_vit and model.qformer must be of the same BLIP-2"
        )
    phi = phi_config(Path(section.phi))
    if section.resid_dropout is not None:
        phi.resid_pdrop = section.resid_dropout
    return TinyGPTVConfig(
        vision_config=vision,
        qformer_config=qformer,
        text_config=phi,
        num_query_tokens=blip2.weights["query_tokens"].shape[1],
        proj_hidden_size=section.proj_hidden_size,
        image_token_id=_set_special_tokens(phi, Path(section.phi)),
        lora_r=section.lora_r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        lora_targets=tuple(section.lora_targets),
        prompt_template=text.prompt_template,
        end_sym=text.end_sym,
    )


def base_paths(section: ModelSection) -> dict[str, Path]:
    """Return the paths of the base weights of a recipe by part."""
    return {"phi": Path(section.phi), "eva_vit": Path(section.eva_vit), "qformer": Path(section.qformer)}


def meta_model(config: TinyGPTVConfig) -> TinyGPTVForConditionalGeneration:
    """Build a model on the meta device, for the names and shapes of its parameters."""
    with torch.device("meta"):
        return TinyGPTVForConditionalGeneration(config)


def assemble(
    config: TinyGPTVConfig,
    base: Mapping[str, Path],
    trained: Source | None,
    *,
    frozen_dtype: torch.dtype,
    trainable: Sequence[Part] = (),
    quantization: ModelSection | None = None,
) -> TinyGPTVForConditionalGeneration:
    """Build a model of these sizes on the CPU with all its weights.

    Args:
        config: the sizes.
        base: files of "phi", "eva_vit" and "qformer".
        trained: trained weights, checked by `fitting_source`.
        frozen_dtype: of all weights that the published stages keep frozen.
        trainable: parts that are kept in fp32.
        quantization: whose frozen_bits, quantize_vision and fp8 say what is quantized; None: nothing is.

    Raises:
        WeightsError: see `build_model`.
    """
    model = typed_meta_model(config, frozen_dtype, trainable)
    sources = _sources(_shapes(model), config, base, trained)
    quantized = {} if quantization is None else _quantize(model, quantization)
    model.to_empty(device="cpu")
    for source in sources:
        LOGGER.info("%s: %d tensors loaded, %d ignored", source.path, len(source.weights), len(source.ignored))
    _load(model, quantized, {name: stored for source in sources for name, stored in source.weights.items()})
    _initialize(model, {name for source in sources for name in source.weights})
    if trained is not None:
        model.frozen_updates = {name: trained.weights[name].read() for name in trained.frozen_updates}
    return model.eval()


def all_weights(config: TinyGPTVConfig, base: Mapping[str, Path], trained: Source) -> dict[str, Stored]:
    """Return every parameter of the model as the files have it, in the model's order; nothing is read yet.

    Args:
        config: the sizes.
        base: files of "phi", "eva_vit" and "qformer".
        trained: trained weights, checked by `fitting_source` with nothing allowed to be missing.

    Raises:
        WeightsError: a file is missing or does not fit, or no file supplies a parameter.
    """
    shapes = _shapes(meta_model(config))
    found = {
        name: stored for source in _sources(shapes, config, base, trained) for name, stored in source.weights.items()
    }
    left = shapes.keys() - found.keys()
    # The biases of the added norms are never trained, so they have their initial values.
    constant = {name: in_memory(_initial_norm(name, shapes[name])) for name in left if ADDED_NORMS.fullmatch(name)}
    if left - constant.keys():
        raise WeightsError(f"no file supplies {listing(left - constant.keys())}")
    return {name: found[name] if name in found else constant[name] for name in shapes}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Phi folder.

    Raises:
        WeightsError: there is none, or it is damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        reason = str(error).strip().split("\n")[0]
        for file in sorted(folder.glob("*.json")):
            if (other := other_file(file)) is not None:
                raise WeightsError(f"{file}: {other}") from None
        raise WeightsError(
            f"{folder}: no usable tokenizer ({reason}); put Phi's tokenizer files into it, of microsoft/phi-2"
        ) from None


def _set_special_tokens(phi: PhiConfig, folder: Path) -> int:
    """Copy the BOS, EOS and padding ids from the tokenizer into `phi`; return the id for image positions."""
    tokenizer = load_tokenizer(folder)
    end = tokenizer.eos_token_id
    if end is None:
        raise WeightsError(
            f"{folder}: the tokenizer has no EOS token; put the tokenizer files of microsoft/phi-2 there"
        )
    if phi.eos_token_id not in (None, end):
        LOGGER.warning(
            "%s: the EOS token is %s in config.json and %d in the tokenizer, which is used",
            folder,
            phi.eos_token_id,
            end,
        )
    # As in the original, one token is BOS, EOS and padding.
    phi.bos_token_id = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    phi.eos_token_id = phi.pad_token_id = end
    largest, image_token = max(tokenizer.get_vocab().values()), phi.vocab_size - 1
    if largest >= image_token:
        raise WeightsError(
            f"{folder}: the tokenizer uses ids up to {largest} of a vocabulary of {phi.vocab_size}, whose last row "
            "must be free to mark images; use a Phi whose embedding has a spare row, as Phi-2's does"
        )
    return image_token


def empty_model(
    config: TinyGPTVConfig,
    frozen_dtype: torch.dtype,
    trainable: Sequence[Part] = (),
    device: torch.device | str = "cpu",
) -> TinyGPTVForConditionalGeneration:
    """Build a model in its final dtypes with uninitialized memory, by way of the meta device: nothing is held twice.

    Args:
        config: the sizes.
        frozen_dtype: of all weights that the published stages keep frozen.
        trainable: parts that are kept in fp32.
        device: the device of its memory.
    """
    return typed_meta_model(config, frozen_dtype, trainable).to_empty(device=device)


def typed_meta_model(
    config: TinyGPTVConfig, frozen_dtype: torch.dtype, trainable: Sequence[Part] = ()
) -> TinyGPTVForConditionalGeneration:
    """Build a model on the meta device in its final dtypes; see `empty_model`."""
    model = meta_model(config).to(frozen_dtype)  # type: ignore[arg-type]  # transformers' decorator hides the signature
    for name, parameter in model.named_parameters():
        if always_fp32(name) or any(part(name) for part in trainable):
            parameter.data = parameter.data.float()
    return model


def _quantize(model: nn.Module, section: ModelSection) -> dict[str, FrozenLinear]:
    """Have the layers that a recipe names keep their weights in fewer bits; return those of them that the model has."""
    layers: dict[str, FrozenLinear] = {}
    if section.frozen_bits is not None:
        layers |= quantize_layers(model, section.frozen_bits, vision=section.quantize_vision)
    if section.fp8 is not None:
        layers |= use_fp8(model, phi=section.fp8 == "all")
    return layers


def _load(model: nn.Module, quantized: Mapping[str, FrozenLinear], weights: Mapping[str, Stored]) -> None:
    """Read all weights one at a time into the model's parameters and its quantized layers."""
    copy_weights(
        dict(model.named_parameters()), {name: stored for name, stored in weights.items() if name not in quantized}
    )
    for name, layer in quantized.items():
        layer.store(weights[name].read())
    if quantized:
        stored = sum(buffer.nbytes for buffer in quantized_buffers(model).values())
        LOGGER.info("%d linear layers quantized, in %.3g GB", len(quantized), stored / 1e9)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _sources(
    shapes: Mapping[str, tuple[int, ...]], config: TinyGPTVConfig, base: Mapping[str, Path], trained: Source | None
) -> list[Source]:
    """Return the base files, checked, and then the trained weights, which replace what both hold."""
    sources = []
    for source, belongs, advice in _base_sources(config, base):
        check_weights({name: shape for name, shape in shapes.items() if belongs(name, source)}, source, advice)
        sources.append(source)
    return sources if trained is None else [*sources, trained]


def _base_sources(
    config: TinyGPTVConfig, base: Mapping[str, Path]
) -> list[tuple[Source, Callable[[str, Source], bool], str]]:
    """Return each base file with the rule of what it must supply, and the likely cause if it does not."""

    def of_phi(name: str, source: Source) -> bool:
        # No Phi-2 file has TinyGPT-V's own norms, but an exported one may.
        optional = lora(name) or (ADDED_NORMS.fullmatch(name) and not _has_kind(name, source.weights))
        return name.startswith("language_model.") and not optional

    def of_vit(name: str, _: Source) -> bool:
        return name.startswith("visual_encoder.")

    def of_blip2(name: str, _: Source) -> bool:
        return name.startswith(("qformer.", "ln_vision.", "query_tokens"))

    text, vision = config.text_config, config.vision_config
    return [
        (
            phi_source(base["phi"], text.num_attention_heads),
            of_phi,
            "These are not all weights of a Phi-2, or its config.json is of another one: name a whole folder of it",
        ),
        (
            eva_source(base["eva_vit"], vision),
            of_vit,
            "model.eva_vit must name an EVA ViT of BLIP-2 (eva_vit_g.pth, or a file of its names)",
        ),
        (
            blip2_source(base["qformer"]),
            of_blip2,
            "model.qformer must name a BLIP-2 file (blip2_pretrained_flant5xxl.pth, or a file of its names)",
        ),
    ]


def _has_kind(name: str, names: Collection[str]) -> bool:
    """Return whether any layer has this norm in `names`: then all layers must."""
    return any(ADDED_NORMS.fullmatch(other) and in_layer(other) == in_layer(name) for other in names)


def _initialize(model: TinyGPTVForConditionalGeneration, loaded: set[str]) -> None:
    """Give initial values to the projections, LoRA and added norms that no file supplied.

    Raises:
        WeightsError: no file supplied something else.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    left = parameters.keys() - loaded
    unexplained = {n for n in left if not (projections(n) or lora(n) or ADDED_NORMS.fullmatch(n))}
    unexplained |= {name for name in buffers if not name.endswith(KEY_BIAS)} - quantized_buffers(model).keys()
    if unexplained:
        raise WeightsError(f"no file supplies {listing(unexplained)}; the log lists what each file held")
    with torch.no_grad():
        for name in filter(ADDED_NORMS.fullmatch, left):
            parameters[name].copy_(_initial_norm(name, tuple(parameters[name].shape)))
        for name, module in model.named_modules():
            if isinstance(module, LoRALinear) and f"{name}.lora_A.weight" in left:
                module.reset_lora()
            elif isinstance(module, nn.Linear) and projections(f"{name}.weight") and f"{name}.weight" in left:
                module.reset_parameters()
    _zero_buffers(model)
    if left:
        added = {name for name in left if ADDED_NORMS.fullmatch(name)}
        counts = {"projections": sum(map(projections, left)), "LoRA": sum(map(lora, left)), "added norms": len(added)}
        LOGGER.info("initialized: %s", ", ".join(f"{n} tensors of {kind}" for kind, n in counts.items() if n))


def _zero_buffers(model: nn.Module) -> None:
    """Zero timm's key bias, which is constant and in no file."""
    for name, buffer in model.named_buffers():
        if name.endswith(KEY_BIAS):
            buffer.zero_()


def _initial_norm(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)
