"""What a recipe holds: plain dataclasses that check themselves. Everything here is checked before torch is imported.

A recipe is the YAML of one stage. DeepSpeed's JSON holds what is DeepSpeed's (ZeRO, precision, offload, communication).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tinygptv_ds.config.data_section import DataSection
from tinygptv_ds.config.evaluation_section import EvaluationSection
from tinygptv_ds.config.limits import check_limits
from tinygptv_ds.config.nearest import nearest
from tinygptv_ds.config.optimizer_section import OptimizerSection
from tinygptv_ds.config.parts import check_parts
from tinygptv_ds.config.template_names import PROMPT_POOLS
from tinygptv_ds.config.train_section import TrainSection
from tinygptv_ds.errors import ConfigError, require, shown

WEIGHTS = ("phi", "eva_vit", "qformer", "init_from")  # the fields of `ModelSection` that are paths of weights


@dataclass(frozen=True)
class ModelSection:
    """Weights to start from, and what is built around them."""

    phi: str
    """Folder of a Phi checkpoint (config.json, tokenizer, weights): hf download microsoft/phi-2."""

    eva_vit: str
    """`eva_vit_g.pth` (LAVIS: models/BLIP2/eva_vit_g.pth), or a file with the same names and other sizes."""

    qformer: str
    """`blip2_pretrained_flant5xxl.pth` (LAVIS: models/BLIP2), or a file with the same names and other sizes."""

    init_from: str | None = None
    """Trained weights of an earlier stage: a run directory, its `model/`, or a `.pth` of the original; null: the
    projections start from random values."""

    allow_missing: list[str] = field(default_factory=list)
    """Which of llama_proj, llama_proj2, norms and lora `init_from` may lack; those start from their initial values.
    Whatever is not listed must be there."""

    image_size: int = 224
    """Side of the square input in pixels; position embeddings are interpolated to it. An image takes 32 tokens in any
    case."""

    eva_vit_depth: int = 39
    """Blocks of the ViT that are used (the published file holds one more)."""

    eva_vit_heads: int = 16
    """Attention heads of the ViT, which its file does not state."""

    qformer_heads: int = 12
    """Attention heads of the Q-Former, which its file does not state."""

    proj_hidden_size: int = 4096
    """Width between the two projections."""

    train: list[str] | None = None
    """What is trained: a list of projections, norms, lora, qformer, vit and llm; null: what the stage trains as
    published. Trained parts are kept in fp32."""

    lora_r: int = 0
    """LoRA rank; 0 builds no LoRA."""

    lora_alpha: float = 16.0
    """LoRA scale: the update is multiplied by alpha / r."""

    lora_dropout: float = 0.05
    """Dropout before LoRA's A."""

    lora_targets: list[str] = field(default_factory=lambda: ["query_key_value", "dense"])
    """Linear layers of a Phi block that get LoRA, of query_key_value, dense, fc1 and fc2."""

    resid_dropout: float | None = None
    """Dropout on attention and MLP outputs in training; null: the value of Phi's config.json (Phi-2: 0.1)."""

    frozen_bits: int | None = None
    """Keep the frozen weights of Phi's linear layers in 4 bit (NF4, double quantization) or 8 bit (scales for blocks of
    256), for cards of 8 to 12 GB: 4, 8, or null for 16 bit. Needs requirements-quant.txt and ZeRO-1 or 2; what is
    trained keeps its precision, and exports merge LoRA into the 16-bit weights."""

    quantize_vision: bool = False
    """With frozen_bits: the linear layers of the ViT, too. Features then have to be computed with the same values."""

    fp8: str | None = None
    """Compute frozen linear layers in fp8 (e4m3, a scale for each row), on GPUs since Ada and Hopper: vision for those
    of the ViT, all for Phi's, too, or null. A CPU simulates it. Not with ZeRO-3, nor with frozen_bits for the same
    layers. Features then have to be computed with the same values."""

    attention: str = "auto"
    """Attention backend: auto, flash_attn_3, flash_attn, torch_varlen or sdpa."""

    compile: bool | str = "auto"
    """Compile the blocks of Phi, ViT and Q-Former with torch.compile: true, false, or auto, which does so on a GPU
    where there is a compiler, except under ZeRO-3."""

    gradient_checkpointing: bool | int = False
    """Recompute Phi's blocks in the backward pass, which takes less memory and up to a third more time: true for every
    block, N for every N-th one. Either recomputes all blocks of a ViT that is trained, too."""

    def __post_init__(self) -> None:
        check_limits("model", self, image_size=4096, eva_vit_depth=1000, eva_vit_heads=1024, qformer_heads=1024)
        check_limits("model", self, proj_hidden_size=1_000_000, lora_r=8192, lora_alpha=1e6)
        check_limits("model", self, gradient_checkpointing=1000)
        for name in ("eva_vit_depth", "eva_vit_heads", "qformer_heads", "proj_hidden_size"):
            require(getattr(self, name) > 0, f"model.{name} must be positive")
        dropout = self.resid_dropout
        require(dropout is None or 0 <= dropout < 1, "model.resid_dropout must be in [0, 1)")
        require(self.image_size > 0, "model.image_size must be positive")
        require(self.lora_r >= 0, "model.lora_r must be 0 (no LoRA) or a positive rank")
        require(self.lora_alpha > 0, "model.lora_alpha must be positive: LoRA's update is multiplied by it")
        require(0 <= self.lora_dropout < 1, "model.lora_dropout must be in [0, 1)")
        parts = ("llama_proj", "llama_proj2", "norms", "lora")
        odd = [part for part in self.allow_missing if part not in parts]
        require(
            not odd, f"model.allow_missing: unknown {shown(odd)}; the parts that a stage trains are {', '.join(parts)}"
        )
        if self.train is not None:
            require(bool(self.train), "model.train is empty; null trains what the stage trains as published")
            check_parts("model.train", self.train)
            has_lora = "lora" not in self.train or self.lora_r > 0
            require(has_lora, "model.train names lora, but model.lora_r is 0, which builds none")
        require(self.gradient_checkpointing >= 0, "model.gradient_checkpointing must be true, false or N from 1 on")
        known = {"query_key_value", "dense", "fc1", "fc2"}
        unknown = [t for t in self.lora_targets if t not in known]
        require(not unknown, f"model.lora_targets: unknown {shown(unknown)}; a Phi block has {sorted(known)}")
        self._check_frozen_bits()
        self._check_fp8()
        require(self.compile in (True, False, "auto"), "model.compile must be auto, true or false")
        backends = ("auto", "flash_attn_3", "flash_attn", "torch_varlen", "sdpa")
        require(
            self.attention in backends,
            f"model.attention: {shown(self.attention)} is not one of {', '.join(backends)}",
        )

    def _check_frozen_bits(self) -> None:
        bits = self.frozen_bits
        require(bits in (None, 4, 8), f"model.frozen_bits must be 4, 8 or null (16 bit), not {shown(bits)}")
        if bits is None:
            require(not self.quantize_vision, "model.quantize_vision needs model.frozen_bits, which is null")
            return
        trained = set(self.train or ())
        quantized = {"llm": "Phi", "vit": "the ViT"} if self.quantize_vision else {"llm": "Phi"}
        for part in trained & quantized.keys():
            remedy = "model.frozen_bits to null" if part == "llm" else "model.quantize_vision to false"
            raise ConfigError(
                f"model.train names {part}, but model.frozen_bits keeps the weights of {quantized[part]} quantized, "
                f"which no optimizer can move. Leave {part} out of model.train (LoRA trains next to quantized "
                f"weights), or set {remedy}"
            )

    def _check_fp8(self) -> None:
        require(self.fp8 in (None, "vision", "all"), f"model.fp8 must be vision, all or null, not {shown(self.fp8)}")
        if self.fp8 is None:
            return
        twice = self.quantize_vision or (self.fp8 == "all" and self.frozen_bits is not None)
        layers = "the ViT" if self.quantize_vision else "Phi"
        require(
            not twice,
            f"model.fp8: {self.fp8} and model.frozen_bits: {self.frozen_bits} both store the weights of {layers}; set "
            "one of them to null (fp8: vision goes with frozen_bits where quantize_vision is false)",
        )
        for part, whose in {"vit": "the ViT", **({"llm": "Phi"} if self.fp8 == "all" else {})}.items():
            require(
                part not in (self.train or ()),
                f"model.train names {part}, but model.fp8: {self.fp8} keeps the weights of {whose} in fp8, which no "
                f"optimizer can move. Leave {part} out of model.train, or set model.fp8 to "
                f"{'vision or ' if part == 'llm' else ''}null",
            )


@dataclass(frozen=True)
class TextSection:
    """How a sample becomes tokens."""

    prompts: str | None = None
    """Name of a pool of prompts.yaml that captions are asked for with (stage3); null: bare captions, the image alone is
    the prompt."""

    prompt_per: str = "sample"
    """Whether one of `prompts` is drawn for each sample, or for each step as the original does: sample or step."""

    prompt_template: str | None = None
    """Wrapped around every question, with {} in its place; null: no template."""

    end_sym: str = "\n"
    """Text that ends every answer: a target in training, and where generation stops."""

    max_txt_len: int = 32
    """Answer tokens at most, `end_sym` included (a longer answer loses it)."""

    max_context_len: int = 3800
    """Prompt tokens at most, image tokens included."""

    def __post_init__(self) -> None:
        check_limits("text", self, max_txt_len=2**40, max_context_len=2**40)
        require(self.max_txt_len > 0, "text.max_txt_len must be positive")
        require(self.max_context_len > 0, "text.max_context_len must be positive")
        template_ok = self.prompt_template is None or self.prompt_template.count("{}") == 1
        require(template_ok, "text.prompt_template must hold {} exactly once, where the question goes")
        if self.prompts is not None and self.prompts not in PROMPT_POOLS:
            hint = nearest(self.prompts, PROMPT_POOLS)
            raise ConfigError(f"text.prompts: {shown(self.prompts)} is no pool of prompts{hint}")
        require(self.prompt_per in ("sample", "step"), "text.prompt_per must be sample or step")


@dataclass(frozen=True)
class Recipe:
    """One stage of training."""

    stage: int
    """Stage of the training, 1 to 4."""

    model: ModelSection
    """Weights to start from, and what is built around them."""

    data: DataSection
    """The stream of samples."""

    optimizer: OptimizerSection
    """AdamW and its learning-rate schedule."""

    train: TrainSection
    """How long, how much at once, what is reported."""

    text: TextSection = field(default_factory=TextSection)
    """How a sample becomes tokens."""

    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    """Scores during training, logged as eval/NAME/strict and so on (docs/evaluation.md)."""

    seed: int = 42
    """Seed of data order, prompts and dropout; the same on every rank."""

    deepspeed: dict = field(default_factory=dict)
    """Changes to the DeepSpeed JSON by its own keys, e.g. {gradient_clipping: 1.0}."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed must be between 0 and 2^63 - 1, not {shown(self.seed)}")
        require(self.stage in (1, 2, 3, 4), f"stage must be 1, 2, 3 or 4, not {self.stage}")
        self._check_keep_best()
        require(
            not self.train.validate_every or self.data.has_validation,
            "train.validate_every is set, but there is nothing to validate on: name datasets in data.validation, or "
            "hold some of the training's back with data.validation_share",
        )
        read, limit = self.data.read_timeout_seconds, 60 * self.train.step_minutes
        require(
            not limit or read < limit,
            f"data.read_timeout_seconds ({read:g}) must be below train.step_minutes ({limit:g} s), so that a "
            "dataloader worker that hangs is restarted before the run ends",
        )
        steps, o = self.train.steps_per_cycle, self.optimizer
        require(
            o.schedule == "published" or o.warmup_steps + o.decay_steps <= steps,
            f"optimizer.warmup_steps ({o.warmup_steps}) and decay_steps ({o.decay_steps}) do not fit into the "
            f"{steps} steps of train.epochs x train.steps_per_epoch",
        )
        require(
            o.schedule != "step" or o.warmup_steps <= self.train.steps_per_epoch,
            f"optimizer.warmup_steps ({o.warmup_steps}): the schedule step warms up within its first epoch of "
            f"{self.train.steps_per_epoch} steps (train.steps_per_epoch)",
        )

    def _check_keep_best(self) -> None:
        """Check that the metric of `train.keep_best` is measured while training."""
        metric = self.train.keep_best
        if metric is None:
            return
        where = f"train.keep_best is {shown(metric)}"
        if metric == "val/loss":
            require(self.train.validate_every > 0, f"{where}: say how often with train.validate_every, in steps")
            return
        labels = [benchmark.label for benchmark in self.evaluation.benchmarks]
        kind, _, rest = metric.partition("/")
        named = kind == "eval" and rest.rpartition("/")[0] in labels
        known = ["val/loss", *(f"eval/{label}/SCORE" for label in labels)]
        require(named, f"{where}, which is not measured; choose one of {', '.join(known)}")
        require(self.evaluation.every > 0, f"{where}: say how often with evaluation.every, in steps")
