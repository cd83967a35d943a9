"""What a recipe holds: plain dataclasses that check themselves. Everything here is checked before torch is imported.

A recipe is the YAML of one stage. DeepSpeed's JSON holds what is DeepSpeed's (ZeRO, precision, offload, communication).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tinygptv_ds.config.data_section import DataSection
from tinygptv_ds.config.evaluation_section import EvaluationSection
from tinygptv_ds.config.nearest import nearest
from tinygptv_ds.errors import ConfigError, require

PARTS = {
    "projections": "the two linear layers between Q-Former and Phi",
    "norms": "the weights of Phi's norms",
    "lora": "LoRA's A and B",
    "qformer": "the Q-Former and its query tokens",
    "vit": "the ViT and the norm after it",
    "llm": "all of Phi but LoRA",
}


def _check_parts(where: str, parts: Iterable[str]) -> None:
    for part in parts:
        require(part in PARTS, f"{where}: {part!r} is no part of the model{nearest(str(part), PARTS)}")


@dataclass(frozen=True)
class ModelSection:
    """Weights to start from, and what is built around them.

    Attributes:
        phi: folder of a Phi checkpoint (config.json, tokenizer, weights).
        eva_vit: `eva_vit_g.pth`, or a file of its names and other sizes.
        qformer: `blip2_pretrained_flant5xxl.pth`, or a file of its names and other sizes.
        init_from: trained weights of an earlier stage (a run directory, its `model/`, or a `.pth` of the original);
            None: the projections start random.
        allow_missing: of llama_proj, llama_proj2, norms and lora, those that `init_from` may be without, and that then
            start from their initial values; what is not listed must be there.
        image_size: side of the square input in pixels; position embeddings are interpolated to it.
        eva_vit_depth: blocks used of the ViT (the published file holds one more than is used).
        eva_vit_heads: attention heads of the ViT, which its file does not tell.
        qformer_heads: attention heads of the Q-Former, which its file does not tell.
        proj_hidden_size: width between the two projections.
        train: what learns instead of what the stage trains as published, of `PARTS`; null: as published. Parts that
            learn lie in fp32.
        lora_r: LoRA rank; 0 builds no LoRA.
        lora_alpha: LoRA scale, alpha / r.
        lora_dropout: dropout before LoRA's A.
        lora_targets: linear layers of a Phi block that get LoRA.
        resid_dropout: dropout on attention and MLP outputs while training (Phi-2's own value is 0.1); None keeps the
            value of Phi's config.json.
        attention: auto, flash_attn, torch_varlen or sdpa.
        gradient_checkpointing: recompute Phi's blocks in the backward pass, which takes less memory and, for all of
            them, about a third more time: true for every block, N for every N-th one.
    """

    phi: str
    eva_vit: str
    qformer: str
    init_from: str | None = None
    allow_missing: list[str] = field(default_factory=list)
    image_size: int = 224
    eva_vit_depth: int = 39
    eva_vit_heads: int = 16
    qformer_heads: int = 12
    proj_hidden_size: int = 4096
    train: list[str] | None = None
    lora_r: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    lora_targets: list[str] = field(default_factory=lambda: ["query_key_value", "dense"])
    resid_dropout: float | None = None
    attention: str = "auto"
    gradient_checkpointing: bool | int = False

    def __post_init__(self) -> None:
        require(self.image_size > 0, "model.image_size must be positive")
        require(self.lora_r >= 0, "model.lora_r must be 0 (no LoRA) or a positive rank")
        require(0 <= self.lora_dropout < 1, "model.lora_dropout must lie in [0, 1)")
        parts = ("llama_proj", "llama_proj2", "norms", "lora")
        odd = [part for part in self.allow_missing if part not in parts]
        require(not odd, f"model.allow_missing: unknown {odd}; the parts that a stage trains are {', '.join(parts)}")
        if self.train is not None:
            require(bool(self.train), "model.train is empty; null trains what the stage trains as published")
            _check_parts("model.train", self.train)
            has_lora = "lora" not in self.train or self.lora_r > 0
            require(has_lora, "model.train names lora, but model.lora_r is 0, which builds none")
        require(self.gradient_checkpointing >= 0, "model.gradient_checkpointing must be true, false or N from 1 on")
        known = {"query_key_value", "dense", "fc1", "fc2"}
        unknown = [t for t in self.lora_targets if t not in known]
        require(not unknown, f"model.lora_targets: unknown {unknown}; a Phi block has {sorted(known)}")
        backends = ("auto", "flash_attn", "torch_varlen", "sdpa")
        require(self.attention in backends, f"model.attention: {self.attention!r} is not one of {', '.join(backends)}")


@dataclass(frozen=True)
class TextSection:
    """How a sample becomes tokens.

    Attributes:
        prompts: a pool of prompts.yaml that captions are asked for with ("stage3"), or None: bare captions.
        prompt_per: one of `prompts` is drawn for each "sample", or for each "step", as the original does.
        prompt_template: wraps every question, `{}` stands for it; None: no wrap.
        end_sym: ends every answer; a target in training, and where generation stops.
        max_txt_len: answer tokens at most, `end_sym` included (a longer answer loses it).
        max_context_len: prompt tokens at most, image rows included.
    """

    prompts: str | None = None
    prompt_per: str = "sample"
    prompt_template: str | None = None
    end_sym: str = "\n"
    max_txt_len: int = 32
    max_context_len: int = 3800

    def __post_init__(self) -> None:
        require(self.max_txt_len > 0, "text.max_txt_len must be positive")
        require(self.max_context_len > 0, "text.max_context_len must be positive")
        template_ok = self.prompt_template is None or self.prompt_template.count("{}") == 1
        require(template_ok, "text.prompt_template must hold {} exactly once, where the question goes")
        require(self.prompt_per in ("sample", "step"), "text.prompt_per must be sample or step")


SCHEDULES = ("published", "cosine", "constant", "wsd")


@dataclass(frozen=True)
class OptimizerSection:
    """AdamW and its schedule.

    Attributes:
        lr: rate at the end of the warm-up.
        lr_scale: factors on the rate by part (of `PARTS`, the first that a parameter belongs to); 1 for the others.
        schedule: "published": a warm-up that counts steps within an epoch, then a cosine that has run since step 0, as
            the original computes it. The others count the warm-up once, from the start: "cosine" falls from its end on
            to `min_lr` at the last step, "constant" stays at `lr`, "wsd" (warm-up, stable, decay) stays there until
            the last `decay_steps` and then falls to `min_lr` in a straight line.
        min_lr: what the schedule heads for; above `lr` it rises (the published stage 4).
        warmup_lr: rate of the first step.
        warmup_steps: steps of warm-up.
        decay_steps: steps of the fall at the end, for "wsd" alone.
        weight_decay: for matrices; norms and biases have none.
        betas: AdamW's betas.
        gradient_clipping: None takes the DeepSpeed JSON's value; a number has to agree with it. 0: off.
    """

    lr: float
    min_lr: float
    warmup_lr: float = 1e-6
    warmup_steps: int = 0
    schedule: str = "published"
    decay_steps: int = 0
    lr_scale: dict = field(default_factory=dict)
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    gradient_clipping: float | None = None

    def __post_init__(self) -> None:
        require(self.lr > 0 and self.min_lr >= 0, "optimizer.lr must be positive and optimizer.min_lr not negative")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps must be 0 or more")
        require(
            self.schedule in SCHEDULES,
            f"optimizer.schedule: {self.schedule!r} is unknown{nearest(self.schedule, SCHEDULES)}",
        )
        wsd = self.schedule == "wsd"
        require(self.decay_steps > 0 or not wsd, "optimizer.schedule wsd needs optimizer.decay_steps above 0")
        require(self.decay_steps == 0 or wsd, "optimizer.decay_steps is of the schedule wsd; leave it 0 for others")
        _check_parts("optimizer.lr_scale", self.lr_scale)
        for part, factor in self.lr_scale.items():
            number = isinstance(factor, int | float) and not isinstance(factor, bool)
            require(number and factor > 0, f"optimizer.lr_scale.{part} must be a positive number, not {factor!r}")
        require(len(self.betas) == 2, "optimizer.betas must be two numbers")


@dataclass(frozen=True)
class TrainSection:
    """How long, how much at once, what is reported.

    Attributes:
        batch_size: samples of one optimizer step, over all ranks and accumulation steps.
        micro_batch_size: samples of one forward pass on one rank; null where `max_tokens` is given.
        max_tokens: instead of it: as many samples as have about this many tokens together, image rows included. A
            longer sample is left out and counted.
        cycles: runs in a row, each with a fresh optimizer and schedule, from the weights of the one before; samples go
            on. The published stage 1 was run 17 times.
        epochs: of one cycle, each of `steps_per_epoch`.
        steps_per_epoch: optimizer steps of an "epoch" of the schedule.
        loss_reduction: "step_mean" divides by the target tokens of the whole step; "micro_batch_mean" is the original's
            mean over each micro-batch.
        log_every: steps between log lines.
        sample_every: steps between panels of generated answers; 0: only at the end.
        sample_count: images in a panel.
        validate_every: steps between validation losses, on `data.validation` or what `data.validation_share` holds
            back; 0: only at the end.
        validation_samples: samples of each dataset that they are measured on, the same each time.
        max_overflows: in fp16, this many steps in a row that overflow, each skipped with the loss scale halved, end the
            run (30 halve it by 10^9). In bf16 and fp32 the first loss or gradient that is not finite does.
        wandb: a project of Weights & Biases to which the scalars go as well; null: none. The package is an extra:
            pip install wandb.
        checkpoint_every: steps between checkpoints; 0: none by steps. One is made at the end in any case.
        checkpoint_minutes: minutes between checkpoints, by rank 0's clock; 0: none by time. Both may be given.
        keep_checkpoints: the newest ones that are kept; older ones are removed.
        keep_every: of the older ones, those whose step is a multiple of this are kept for ever; 0: none.
        deepspeed_checkpoints: write each checkpoint in DeepSpeed's own format too, while training waits.
        startup_minutes: that loading and the first step may take at most, and later a save, a validation or a panel.
        step_minutes: that any other step may take, its wait for data included, before the run ends with the stacks of
            all ranks written; 0: no limit.
        slow_step_seconds: a step that has taken so long, and five times the median of those before, is reported, with
            the stacks of all ranks written; 0: none is.
        lost_after_seconds: without a sign of life after which a rank counts as lost, and the others end. A process that
            ends is noticed at once. 0: ranks tell each other nothing.
    """

    batch_size: int
    micro_batch_size: int | None = None
    max_tokens: int | None = None
    cycles: int = 1
    epochs: int = 1
    steps_per_epoch: int = 1000
    loss_reduction: str = "step_mean"
    log_every: int = 10
    sample_every: int = 0
    sample_count: int = 4
    validate_every: int = 0
    validation_samples: int = 200
    max_overflows: int = 30
    wandb: str | None = None
    checkpoint_every: int = 1000
    checkpoint_minutes: float = 0.0
    keep_checkpoints: int = 2
    keep_every: int = 0
    deepspeed_checkpoints: bool = False
    startup_minutes: float = 60.0
    step_minutes: float = 20.0
    slow_step_seconds: float = 60.0
    lost_after_seconds: float = 60.0

    def __post_init__(self) -> None:
        positive = ("batch_size", "cycles", "epochs", "steps_per_epoch", "log_every", "validation_samples")
        for name in (*positive, "max_overflows", "keep_checkpoints", "startup_minutes"):
            require(getattr(self, name) > 0, f"train.{name} must be positive")
        sizes = [size for size in (self.micro_batch_size, self.max_tokens) if size is not None]
        require(
            len(sizes) == 1,
            "give either train.micro_batch_size (samples) or train.max_tokens, and null for the other",
        )
        require(sizes[0] > 0, "train.micro_batch_size and train.max_tokens must be positive")
        steps = ("sample_every", "sample_count", "validate_every", "checkpoint_every", "keep_every")
        limits = ("step_minutes", "slow_step_seconds", "lost_after_seconds")
        for name in (*steps, *limits, "checkpoint_minutes"):
            require(getattr(self, name) >= 0, f"train.{name} must be 0 or more")
        known = ("step_mean", "micro_batch_mean")
        require(self.loss_reduction in known, f"train.loss_reduction must be one of {', '.join(known)}")

    @property
    def steps_per_cycle(self) -> int:
        """Optimizer steps of one schedule."""
        return self.epochs * self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.cycles * self.steps_per_cycle

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of a step on one rank; with `max_tokens` the most that there can be.

        Raises:
            ConfigError: the batch does not divide.
        """
        share = (self.micro_batch_size or 1) * world_size
        if self.batch_size % share:
            fits = [m for m in range(1, self.batch_size + 1) if self.batch_size % (m * world_size) == 0]
            advice = f"train.micro_batch_size in {fits}" if fits else f"a train.batch_size divisible by {world_size}"
            shares = f"into micro-batches of {self.micro_batch_size} on" if self.micro_batch_size else "among"
            raise ConfigError(
                f"train.batch_size {self.batch_size} does not divide {shares} {world_size} rank(s): choose {advice}"
            )
        return self.batch_size // share


@dataclass(frozen=True)
class Recipe:
    """One stage of training.

    Attributes:
        stage: 1 to 4.
        seed: of everything random; the same on every rank.
        model: see `ModelSection`.
        text: see `TextSection`.
        data: see `DataSection`.
        optimizer: see `OptimizerSection`.
        train: see `TrainSection`.
        evaluation: see `EvaluationSection`.
        deepspeed: changes to the DeepSpeed JSON, by its own keys.
    """

    stage: int
    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection
    train: TrainSection
    text: TextSection = field(default_factory=TextSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    seed: int = 42
    deepspeed: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.stage in (1, 2, 3, 4), f"stage must be 1, 2, 3 or 4, not {self.stage}")
        require(
            not self.train.validate_every or self.data.has_validation,
            "train.validate_every is set, but there is nothing to validate on: name datasets in data.validation, or "
            "hold some of the training's back with data.validation_share",
        )
        read, limit = self.data.read_timeout_seconds, 60 * self.train.step_minutes
        require(
            not limit or read < limit,
            f"data.read_timeout_seconds ({read:g}) must lie below train.step_minutes ({limit:g} s), so that a loader "
            "process that hangs is begun again before the run ends",
        )
        steps, o = self.train.steps_per_cycle, self.optimizer
        require(
            o.schedule == "published" or o.warmup_steps + o.decay_steps <= steps,
            f"optimizer.warmup_steps ({o.warmup_steps}) and decay_steps ({o.decay_steps}) do not fit into the "
            f"{steps} steps of train.epochs x train.steps_per_epoch",
        )
