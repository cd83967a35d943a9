"""DeepSpeed around the model. The only module that imports deepspeed, and where its private corners are kept."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import Tensor, nn

from tinygptv_ds.data.loader.workers import OnHang
from tinygptv_ds.data.stream.plan import OpenStream
from tinygptv_ds.distributed import complete_env, cores_per_rank
from tinygptv_ds.dtypes import DTYPES
from tinygptv_ds.errors import Stopped
from tinygptv_ds.log import LOGGER, set_up_logging
from tinygptv_ds.models.attention import choose_backend
from tinygptv_ds.models.parameters import frozen_learnt, weight_decay_groups
from tinygptv_ds.models.tinygptv import PackedOutput, TinyGPTVForConditionalGeneration
from tinygptv_ds.train.checkpoint.run_fingerprint import facts_of
from tinygptv_ds.train.liveness.progress import BACKWARD, FORWARD, Progress, first_group_timeout
from tinygptv_ds.train.liveness.watchdog import Watchdog
from tinygptv_ds.train.loss_scale import LossScale
from tinygptv_ds.train.metrics.stopwatch import Stopwatch
from tinygptv_ds.train.setup.broadcast import broadcast_from_rank0
from tinygptv_ds.train.setup.job import Job
from tinygptv_ds.train.setup.run_dir import note_run, start_run_dir

if TYPE_CHECKING:
    from tinygptv_ds.train.checkpoint.saver import Saver

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, under the names that torch gives them


def start_distributed(job: Job) -> Watchdog:
    """Join the other ranks, seed, and open the run directory and its log; what is returned watches over the rest."""
    complete_env()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_per_rank(job.ranks))
    for name in ("DeepSpeed", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    on_cpu = get_accelerator().device_name() == "cpu"
    if on_cpu:
        # Spares a C++ build at every first run. It is for inference among CPUs; training here reduces over gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(job.ranks.local_rank)
    backend = get_accelerator().communication_backend_name() if not on_cpu else "gloo"
    with _quiet_stdout(job.ranks.rank):
        deepspeed.init_distributed(dist_backend=backend, timeout=first_group_timeout(job.recipe.train), verbose=False)
    log_file = broadcast_from_rank0(job.ranks, lambda: str(start_run_dir(job)))
    set_up_logging(job.ranks.rank, Path(log_file))
    torch.manual_seed(job.recipe.seed)
    torch.distributed.barrier()
    LOGGER.info(
        "stage %d on %d rank(s) of %s, ZeRO-%d, %s, run directory %s",
        job.recipe.stage,
        job.ranks.world_size,
        get_accelerator().device_name(),
        job.zero_stage,
        job.precision,
        job.run_dir,
    )
    return Watchdog(job, set_group_timeout)


def set_group_timeout(timeout: timedelta) -> None:
    """How long the collectives that begin from now on may wait, those of DeepSpeed's own process groups too."""
    c10d = torch.distributed.distributed_c10d
    set_timeout = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout  # as it is called in an older torch
    for group in list(c10d._world.pg_map):
        set_timeout(timeout, group)


@contextlib.contextmanager
def _quiet_stdout(rank: int) -> Iterator[None]:
    """Keep what libraries print on the other ranks off the console."""
    with contextlib.ExitStack() as stack:
        if rank != 0:
            devnull = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
        yield


class Engine:
    """One training step at a time, on all ranks alike.

    Attributes:
        deepspeed: the DeepSpeed engine.
        module: the model inside it.
        device: where this rank computes.
        scale: the loss scale under autocast in fp16, else None.
        first_step: where the run goes on.
        saver: makes the run's checkpoints.
        progress: what a watchdog is told of this rank.
        on_hang: writes the stacks of dataloader workers that hang; None: nobody watches.
        skipped_before: optimizer steps left out before a resumption.
        forward_clock: times this rank's forward passes.
        job: recipe, JSON, run directory and ranks.
    """

    def __init__(self, model: TinyGPTVForConditionalGeneration, job: Job, watchdog: Watchdog | None = None) -> None:
        optimizer = job.recipe.optimizer
        self.job = job
        self.device = torch.device(get_accelerator().current_device_name())
        model.always_run_vision = job.zero_stage == 3 or not model.vision_is_frozen
        model.attention = job.recipe.model.attention
        model.frozen_updates |= frozen_learnt(model)
        model.train()
        backend = choose_backend(model.attention, self.device, DTYPES[job.precision])
        LOGGER.info("attention: %s, gradient checkpointing: %s", backend, job.recipe.model.gradient_checkpointing)
        groups = weight_decay_groups(model, optimizer.weight_decay, optimizer.lr_scale)
        adamw = torch.optim.AdamW(
            groups, lr=optimizer.lr, betas=tuple(optimizer.betas), fused=self.device.type == "cuda"
        )
        with _quiet_stdout(1):
            self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=job.deepspeed)
        self.module: TinyGPTVForConditionalGeneration = self.deepspeed.module
        autocast_fp16 = getattr(self.deepspeed.optimizer, "torch_autocast_gradscaler", None) is not None
        self.scale = LossScale(self.deepspeed.optimizer) if autocast_fp16 else None
        self.first_step = 0
        self.saver: Saver
        self.progress = Progress(job.ranks.rank, job.recipe.train, set_group_timeout)
        self.on_hang: OnHang | None = None
        if watchdog is not None:
            self.progress, self.on_hang = watchdog.progress, watchdog.stacks.dump_workers
        self.skipped_before = 0
        self.forward_clock = Stopwatch(self.device)
        self._last = True

    def set_learning_rate(self, rate: float) -> None:
        """For the optimizer step to come."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]

    def set_boundary(self, last: bool) -> None:
        """Whether the micro-batch to come is the last of its step. The recipe's packing decides how many there are."""
        self._last = last
        self.deepspeed.set_gradient_accumulation_boundary(last)

    def micro_step(self, inputs: dict, loss_divisor: Tensor | None, *, number: int, count: int) -> PackedOutput:
        """Forward, backward, and, after the last micro-batch, the optimizer step, on all ranks or on none.

        Args:
            inputs: keyword arguments of the model's packed forward.
            loss_divisor: target tokens of the whole optimizer step, a scalar on the device; None takes the mean over
                this micro-batch, as the original does.
            number: of the micro-batch in its step, from 0.
            count: micro-batches of the step, the same on all ranks.
        """
        self.set_boundary(number + 1 == count)
        self.progress.enter(FORWARD)
        with self.forward_clock.running():
            output = self.deepspeed(**inputs)
        total = output.token_losses.sum()
        if loss_divisor is None:
            loss = total / max(len(output.token_losses), 1) / count
        else:
            # DeepSpeed averages over ranks; the divisor already counts all of them.
            loss = total / loss_divisor * self.job.ranks.world_size
        loss = loss + output.anchor
        # An infinite loss may have finite gradients. Times NaN it has none, and ZeRO leaves the step out on all ranks.
        self.backward_and_step(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
        return output

    def backward_and_step(self, loss: Tensor) -> None:
        """The end of a micro-batch; the optimizer moves after the last of a step."""
        self.progress.enter(BACKWARD)
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        self.deepspeed.step()
        if self._last and self.scale is not None:
            self.scale.update(skipped=not self.deepspeed.was_step_applied())

    @property
    def step_taken(self) -> bool:
        """Whether the last optimizer step moved the weights; it did not, on any rank, if a gradient was not finite."""
        return self.deepspeed.was_step_applied()

    def grad_norm(self) -> float:
        """Of the last optimizer step, before clipping; infinite where it was skipped."""
        return float(self.deepspeed.get_global_grad_norm() or 0.0)

    def loss_scale(self) -> float:
        """The fp16 loss scale; 1 in bf16 and fp32."""
        return self.scale.value if self.scale else float(getattr(self.deepspeed.optimizer, "cur_scale", 1.0))

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps left out so far, before a resumption too, because a gradient was not finite."""
        return self.skipped_before + int(self.deepspeed.skipped_steps)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.job.ranks.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Canonical names and parameters of what learns, in the same order on every rank."""
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def trained_state(self) -> dict[str, Tensor]:
        """fp32 copies of what was trained, whole, on rank 0's CPU; elsewhere none. To be called on all ranks."""
        return self._on_rank_0(safe_get_full_fp32_param)

    def moments(self, moment: str) -> dict[str, Tensor]:
        """As `trained_state`, one of `MOMENTS`. To be called on all ranks."""
        self._link_optimizer_states()
        return self._on_rank_0(lambda parameter: safe_get_full_optimizer_state(parameter, moment))

    def _on_rank_0(self, gather: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        kept = {}
        for name, parameter in self.trained_parameters():
            whole = gather(parameter)
            if self.job.ranks.is_main:
                kept[name] = whole.detach().to("cpu", torch.float32, copy=True)
        return kept

    def save_deepspeed(self, folder: Path, tag: str, state: dict) -> None:
        """Write DeepSpeed's own checkpoint of what was trained, `state` next to it. To be called on all ranks."""
        with _quiet_stdout(1):
            self.deepspeed.save_checkpoint(
                str(folder), tag=tag, client_state={"tinygptv_ds": state}, exclude_frozen_parameters=True
            )

    def set_moments(self, moment: str, value: Callable[[str], Tensor]) -> None:
        """Put one of `MOMENTS` back, `value` giving it whole by parameter. It exists from the first step on."""
        self._link_optimizer_states()
        for name, parameter in self.trained_parameters():
            safe_set_full_optimizer_state(parameter, value(name), moment)

    @property
    def optimizer_steps(self) -> int:
        """What AdamW's bias correction counts: the steps of this cycle that were not left out."""
        return int(next(iter(self._adamw.state.values()))["step"]) if self._adamw.state else 0

    def set_optimizer_steps(self, steps: int) -> None:
        """Set that count, as from a checkpoint."""
        for state in self._adamw.state.values():
            state["step"].fill_(steps)

    def reset_optimizer(self) -> None:
        """As it was before its first step, for a new cycle; the weights stay. To be called on all ranks."""
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self.trained_parameters()}
        for moment in MOMENTS:
            self.set_moments(moment, lambda name: torch.zeros(shapes[name]))
        self.set_optimizer_steps(0)
        if self.scale is not None:
            self.scale.set(LossScale.START, 0)

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        """torch's optimizer inside DeepSpeed's."""
        return getattr(self.deepspeed.optimizer, "optimizer", self.deepspeed.optimizer)

    def _link_optimizer_states(self) -> None:
        """ZeRO-1 and 2 link the states of the first parameter group only after its first step; link them all."""
        optimizer = self.deepspeed.optimizer
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    @contextlib.contextmanager
    def inference(self) -> Iterator[TinyGPTVForConditionalGeneration]:
        """The model in evaluation mode under the engine's precision. To be entered on all ranks."""
        dtype = DTYPES[self.job.precision]
        self.module.eval()
        try:
            with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                yield self.module
        finally:
            self.module.train()


@contextlib.contextmanager
def start_engine(
    model: TinyGPTVForConditionalGeneration, job: Job, stream: OpenStream, watchdog: Watchdog
) -> Iterator[Engine]:
    """The engine of a run, started from the checkpoint that `job.resume` asks for; the ranks part when it ends.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another recipe, other data or other base weights.
    """
    from tinygptv_ds.train.checkpoint import resume
    from tinygptv_ds.train.checkpoint.saver import Saver
    from tinygptv_ds.train.setup.dry_run import finish_dry_run

    facts = facts_of(job.recipe, stream) if job.ranks.is_main else {}
    chosen = broadcast_from_rank0(job.ranks, lambda: resume.choose_checkpoint(job, facts))
    if job.ranks.is_main:
        note_run(job)
    checkpoint = None if chosen is None else resume.open_checkpoint(Path(chosen))
    if checkpoint is not None:
        resume.load_weights(model, checkpoint)
    engine = Engine(model, job, watchdog)
    engine.first_step = resume.restore_optimizer(engine, checkpoint) if checkpoint is not None else 0
    origin = None if checkpoint is None else resume.began_from(job, checkpoint.folder)
    try:
        with Saver(engine, facts, origin) as engine.saver:
            yield engine
            if job.dry_run:
                finish_dry_run(engine)
    except Stopped:
        _part(watchdog)
        raise
    _part(watchdog)


def _part(watchdog: Watchdog) -> None:
    watchdog.leave()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
