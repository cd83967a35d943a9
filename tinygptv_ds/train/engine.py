"""DeepSpeed around the model: the only module that imports deepspeed, and where its private corners are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from tinygptv_ds.config.deepspeed import precision, zero_stage
from tinygptv_ds.config.optimizer_section import OptimizerSection
from tinygptv_ds.distributed import Ranks
from tinygptv_ds.dtypes import DTYPES
from tinygptv_ds.log import held_prints, hold_library_output
from tinygptv_ds.models.attention import choose_backend
from tinygptv_ds.models.eva_vit import KEY_BIAS
from tinygptv_ds.models.loss import PackedOutput
from tinygptv_ds.models.parameters import weight_decay_groups
from tinygptv_ds.models.phi import PhiModel
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.train.flat_optimizer import FlatOptimizer, gradient_norm
from tinygptv_ds.train.loss_scale import LossScale
from tinygptv_ds.train.metrics.stopwatch import Stopwatch
from tinygptv_ds.train.untouched import LeaveUntouched

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, under the names that torch gives them


def init_process_group(ranks: Ranks, timeout: timedelta) -> str:
    """Join the other ranks; returns the kind of device that DeepSpeed trains on ("cuda", "cpu", ...).

    Args:
        ranks: this process among the ranks.
        timeout: how long a collective may wait.
    """
    hold_library_output()
    disable_progress_bar()
    device = get_accelerator().device_name()
    if device == "cpu":
        # Saves a C++ build at every first run. The op speeds up inference on CPUs; training here reduces over gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(ranks.local_rank)
    backend = "gloo" if device == "cpu" else get_accelerator().communication_backend_name()
    with held_prints():
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    return device


class Engine:
    """The DeepSpeed engine around the model: forward, backward, optimizer step, and the state of the optimizer.

    Args:
        model: its trained parameters require gradients, and no others.
        config: the resolved DeepSpeed JSON.
        optimizer: AdamW's settings.
        ranks: this process among the ranks.
        keep_zero: keep ZeRO's optimizer on a single rank, too, as DeepSpeed's own checkpoints need it.

    Attributes:
        deepspeed: the DeepSpeed engine.
        module: the model inside it.
        device: where this rank computes.
        ranks: as given.
        precision: "bf16", "fp16" or "fp32".
        zero_stage: 1, 2 or 3, as configured.
        flat: the optimizer of a single rank, in place of that of ZeRO-1 or 2; else None.
        attention: the attention backend in use.
        untouched: keeps AdamW from moving what a step has not touched.
        scale: the loss scale under autocast in fp16, else None.
        forward_clock: times this rank's forward passes.
        skipped_before: optimizer steps skipped before this engine was created.
    """

    def __init__(
        self,
        model: TinyGPTVForConditionalGeneration,
        config: Mapping[str, Any],
        optimizer: OptimizerSection,
        ranks: Ranks,
        *,
        keep_zero: bool = False,
    ) -> None:
        self.ranks = ranks
        self.precision, self.zero_stage = precision(dict(config)), zero_stage(dict(config))
        self.device = torch.device(get_accelerator().current_device_name())
        model.always_run_vision = self.zero_stage == 3 or not model.vision_is_frozen
        model.train()
        self.attention = choose_backend(model.attention, self.device, DTYPES[self.precision])
        groups = weight_decay_groups(model, optimizer.weight_decay, optimizer.lr_scale)
        make = partial(_make_adamw, settings=optimizer, device=self.device)
        self.flat: FlatOptimizer | None = None
        if not keep_zero and ranks.world_size == 1 and zero_is_needless(dict(config)):
            nn.Module.to(model, self.device)  # before the weights become views: DeepSpeed would move each on its own
            self.flat = FlatOptimizer(groups, make, float(config["gradient_clipping"]))
            for module in model.modules():
                if isinstance(module, PhiModel):
                    module.cast_lora_together = True
            # Stage 0 clips by itself otherwise, and looks at no gradient.
            config = {**config, "zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}
        adamw = make(groups) if self.flat is None else self.flat.optimizer
        self.untouched = LeaveUntouched(adamw, self.device)
        with held_prints():
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=adamw if self.flat is None else partial(_given, self.flat), config=config
            )
        self.module: TinyGPTVForConditionalGeneration = self.deepspeed.module
        _cast_buffers(self.module)
        autocast_fp16 = getattr(self.deepspeed.optimizer, "torch_autocast_gradscaler", None) is not None
        if self.flat is not None:
            autocast_fp16 = self.deepspeed.torch_autocast_z0_gradscaler is not None
            self.deepspeed.torch_autocast_z0_gradscaler = None  # `scale` takes its place
            self.deepspeed.enable_backward_allreduce = False  # it would copy all gradients twice, for one rank's sum
        elif self.zero_stage < 3 and not self.deepspeed.optimizer.cpu_offload:
            _ask_once(self.deepspeed.optimizer)
        self.scale = LossScale(self.deepspeed.optimizer) if autocast_fp16 else None
        self.forward_clock = Stopwatch(self.device)
        self.skipped_before = 0
        self._at_boundary = True

    # ---- one optimizer step

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next optimizer step; each parameter group scales it by its `lr_scale`."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]

    def begin_step(self, *, targets: int, images: int) -> Tensor:
        """Sum this rank's target tokens and images of a step over all ranks; returns the targets, fp32, on the device.

        Without images in the whole step the optimizer passes over what comes before Phi, without targets over all.
        """
        # Filled in on the device: torch.tensor would wait for what is queued there.
        counts = [torch.full((), float(count), device=self.device) for count in (targets, images)]
        totals = self.all_reduce(torch.stack(counts))
        self.untouched.begin_step(totals)
        return totals[0]

    def set_boundary(self, at_boundary: bool) -> None:
        """Declare whether the next micro-batch is the last of its step; packing decides how many there are."""
        self._at_boundary = at_boundary
        self.deepspeed.set_gradient_accumulation_boundary(at_boundary)

    def forward(self, inputs: Mapping[str, Any]) -> PackedOutput:
        """Run the model's packed forward pass on its keyword arguments."""
        with self.forward_clock.running():
            return self.deepspeed(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a scalar loss, which the caller has divided by what it is a mean over."""
        if self.flat is None:
            self.deepspeed.backward(loss, scale_wrt_gas=False)
        else:
            self.deepspeed.backward(loss * self.flat.loss_scale, scale_wrt_gas=False)
            self.flat.add_gradients()

    def step(self) -> None:
        """End a micro-batch; after the last one of a step the optimizer moves the weights, on all ranks or on none."""
        self.deepspeed.step()
        if self._at_boundary and self.scale is not None:
            self.scale.update(skipped=not self.deepspeed.was_step_applied())

    @property
    def step_taken(self) -> bool:
        """Whether the last optimizer step moved the weights; it did not, on any rank, if a gradient was not finite."""
        return self.deepspeed.was_step_applied()

    def grad_norm(self) -> float:
        """Return the gradient norm of the last optimizer step before clipping; infinite where it was skipped."""
        return float(self.deepspeed.get_global_grad_norm() or 0.0)

    def loss_scale(self) -> float:
        """Return the fp16 loss scale; 1 in bf16 and fp32."""
        return self.scale.value if self.scale else float(getattr(self.deepspeed.optimizer, "cur_scale", 1.0))

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped so far because a gradient was not finite, those of `skipped_before` included."""
        return self.skipped_before + int(self.deepspeed.skipped_steps)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    # ---- state of weights and optimizer

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return canonical names and parameters of what is trained, in the same order on every rank."""
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def trained_state(self) -> dict[str, Tensor]:
        """Return whole fp32 copies of the trained weights on rank 0's CPU, nothing elsewhere. Call on all ranks."""
        return self._gather_on_rank0(safe_get_full_fp32_param if self.flat is None else lambda parameter: parameter)

    def moments(self, moment: str) -> dict[str, Tensor]:
        """Return one of `MOMENTS` as `trained_state` returns the weights: zeros before a step. Call on all ranks."""
        if not self._has_moments:
            return self._gather_on_rank0(lambda parameter: torch.zeros(_shape(parameter)))
        if self.flat is not None:
            return self._gather_on_rank0(partial(self.flat.moment, name=moment))
        self._link_optimizer_states()
        return self._gather_on_rank0(lambda parameter: safe_get_full_optimizer_state(parameter, moment))

    def _gather_on_rank0(self, gather: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        kept = {}
        for name, parameter in self.trained_parameters():
            whole = gather(parameter)
            if self.ranks.is_main:
                kept[name] = whole.detach().to("cpu", torch.float32, copy=True)
        return kept

    def set_moments(self, moment: str, value: Callable[[str], Tensor]) -> None:
        """Set one of `MOMENTS`, which exist from the first step taken on; `value` returns it whole, by name."""
        self._link_optimizer_states()
        for name, parameter in self.trained_parameters():
            if self.flat is not None:
                self.flat.moment(parameter, moment).copy_(value(name))
                continue
            with _padded(parameter, value(name), self.ranks.world_size) as whole:
                safe_set_full_optimizer_state(parameter, whole, moment)

    @property
    def optimizer_steps(self) -> int:
        """The steps of this cycle that AdamW's bias correction counts for Phi: those not skipped, with targets."""
        return self._counted(of_images=False)

    @property
    def image_steps(self) -> int:
        """As `optimizer_steps`, for what comes before Phi: of those steps, the ones with images."""
        return self._counted(of_images=True)

    def _counted(self, *, of_images: bool) -> int:
        states = self._adamw.state.items() if self._has_moments else ()
        counts = {self.untouched.needs_images(p): int(state["step"]) for p, state in states}
        return counts.get(of_images, max(counts.values(), default=0))  # where nothing of this kind is trained

    def set_optimizer_steps(self, steps: int, image_steps: int) -> None:
        """Set the counts of `optimizer_steps` and `image_steps`, e.g., from a checkpoint."""
        for parameter, state in self._adamw.state.items():
            state["step"].fill_(image_steps if self.untouched.needs_images(parameter) else steps)

    def reset_optimizer(self) -> None:
        """Reset the optimizer to its state before the first step and keep the weights. Call on all ranks."""
        if self._has_moments:
            shapes = {name: _shape(parameter) for name, parameter in self.trained_parameters()}
            for moment in MOMENTS:
                self.set_moments(moment, lambda name: torch.zeros(shapes[name]))
            self.set_optimizer_steps(0, 0)
        if self.scale is not None:
            self.scale.set(LossScale.START, 0)

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        """torch's optimizer inside DeepSpeed's."""
        return getattr(self.deepspeed.optimizer, "optimizer", self.deepspeed.optimizer)

    @property
    def _has_moments(self) -> bool:
        """Whether AdamW has a state: on all ranks from the first step on that is not skipped."""
        return any(self._adamw.state.values())

    def _link_optimizer_states(self) -> None:
        """Link the optimizer states of all parameter groups to their parameters.

        ZeRO-1 and 2 link those of the first group only, after its first step (DeepSpeed 0.19). Remove when
        `safe_get_full_optimizer_state` works for every group.
        """
        optimizer = self.deepspeed.optimizer
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    @contextlib.contextmanager
    def inference(self) -> Iterator[TinyGPTVForConditionalGeneration]:
        """Yield the model in evaluation mode under the engine's precision. Enter on all ranks."""
        dtype = DTYPES[self.precision]
        self.module.eval()
        try:
            with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                yield self.module
        finally:
            self.module.train()


def zero_is_needless(config: dict[str, Any]) -> bool:
    """Return whether a single rank can do without ZeRO's optimizer: it partitions, offloads and casts nothing here."""
    offload = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    cast = any(config.get(section, {}).get("enabled") for section in ("bf16", "fp16"))
    return zero_stage(config) < 3 and offload == "none" and not cast


def _make_adamw(groups: list[dict[str, Any]], settings: OptimizerSection, device: torch.device) -> torch.optim.AdamW:
    beta1, beta2 = settings.betas
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(beta1, beta2), fused=device.type == "cuda")


def _given(optimizer: FlatOptimizer, parameters: Any) -> FlatOptimizer:
    """Return an optimizer as DeepSpeed wants one that is not torch's: made by a function of the parameters."""
    return optimizer


def _ask_once(optimizer: Any) -> None:
    """Let the optimizer of ZeRO-1 and 2 look for gradients that are not finite once a step, and with few operations.

    DeepSpeed 0.19 casts every gradient to fp64 on its own, adds up each group over the ranks on its own, and copies a
    constant from the host for each group, for which the host waits; with clipping, or a `bf16` section, it waits again.
    The norm says all of it: it is not finite where a gradient is not. Remove when DeepSpeed's own step waits once.
    """

    def norm(norm_type: int = 2) -> Tensor:
        return gradient_norm(map(_sum_of_squares, optimizer.averaged_gradients.values()), add_up)

    def add_up(squares: Tensor) -> Tensor:
        torch.distributed.all_reduce(squares, group=optimizer.dp_process_group)
        return squares

    optimizer.check_overflow = lambda partition_gradients=True: None
    optimizer.scaled_global_norm = norm


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square().sum()


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a whole parameter, which has none of its own while ZeRO-3 has it partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextlib.contextmanager
def _padded(parameter: Any, value: Tensor, ranks: int) -> Iterator[Tensor]:
    """Yield a value with as many elements as all ranks together hold of a parameter under ZeRO-3, zeros at its end.

    Parameters are divided into equal parts, whatever their size, but DeepSpeed 0.19 takes values of their exact size
    only, and fails on the last rank where that does not divide. Remove when it pads values itself.
    """
    size = getattr(parameter, "ds_numel", None)
    if size is None:
        yield value
        return
    missing = parameter.ds_tensor.ds_numel * ranks - size
    parameter.ds_numel = size + missing
    try:
        yield nn.functional.pad(value.flatten(), (0, missing))
    finally:
        parameter.ds_numel = size


def _cast_buffers(model: TinyGPTVForConditionalGeneration) -> None:
    """Cast the ViT's key biases, fixed at zero, to the dtype of its parameters: timm joins them with trained biases.

    DeepSpeed 0.19 casts parameters to bf16 or fp16, but leaves buffers. Remove when it casts them as well.
    """
    dtype = next(model.visual_encoder.parameters()).dtype
    for name, buffer in model.visual_encoder.named_buffers():
        if name.endswith(KEY_BIAS):  # the others are quantized weights
            buffer.data = buffer.data.to(dtype)
