"""The keys of DeepSpeed's JSON that are supported, with the types of their values, and refused ones with the reasons.

A file is checked against these tables without importing deepspeed, which takes seconds. A test holds every supported
key to the installed DeepSpeed. To support another key, add it here with its type.
"""

from __future__ import annotations

from typing import Any

# A leaf is a type, or a tuple of the allowed texts; a mapping is a section; `float` accepts whole numbers, too.
_DEVICES = ("none", "cpu", "nvme")
_DTYPES = ("fp32", "fp16", "bf16")
ZERO: dict[str, Any] = {
    "stage": int,
    "contiguous_gradients": bool,
    "reduce_scatter": bool,
    "reduce_bucket_size": int,
    "allgather_partitions": bool,
    "allgather_bucket_size": int,
    "overlap_comm": bool,
    "offload_param": {
        "device": _DEVICES,
        "nvme_path": str,
        "buffer_count": int,
        "buffer_size": int,
        "pin_memory": bool,
    },
    "offload_optimizer": {
        "device": _DEVICES,
        "nvme_path": str,
        "buffer_count": int,
        "pin_memory": bool,
        "pipeline_read": bool,
        "pipeline_write": bool,
        "ratio": float,
    },
    "sub_group_size": int,
    "stage3_prefetch_bucket_size": int,
    "stage3_param_persistence_threshold": int,
    "stage3_model_persistence_threshold": int,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_gather_16bit_weights_on_model_save": bool,
    "round_robin_gradients": bool,
    "zero_hpz_partition_size": int,
    "zero_quantized_weights": bool,
    "zero_quantized_nontrainable_weights": bool,
    "zero_quantized_gradients": bool,
}
KNOWN: dict[str, Any] = {
    "comment": str,  # of this project; DeepSpeed has no such key
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "gradient_clipping": float,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "communication_data_type": _DTYPES,
    "zero_force_ds_cpu_optimizer": bool,
    "zero_optimization": ZERO,
    "bf16": {"enabled": bool, "check_grad_overflow": bool},
    "fp16": {
        "enabled": bool,
        "loss_scale": float,
        "initial_scale_power": int,
        "loss_scale_window": int,
        "hysteresis": int,
        "consecutive_hysteresis": bool,
        "min_loss_scale": int,
    },
    "torch_autocast": {
        "enabled": bool,
        "dtype": ("bfloat16", "float16"),
        "lower_precision_safe_modules": list,
    },
    "aio": {
        "block_size": int,
        "queue_depth": int,
        "intra_op_parallelism": int,
        "single_submit": bool,
        "overlap_events": bool,
    },
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool, "debug": bool},
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": float,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str,
    },
}
_OPTIMIZER = "it comes from the recipe's optimizer section"
_BOARD = "figures go to the run directory, which always has TensorBoard logs"
_REMOVED = "DeepSpeed has removed it"
_OWN_ADAM = "it needs DeepSpeed's own CPU Adam, and the optimizer here is torch's AdamW"
_MASTERS = "trained weights and their moments are kept in fp32 here, which is what checkpoints hold"
REFUSED = {
    "optimizer": _OPTIMIZER,
    "scheduler": _OPTIMIZER,
    "tensorboard": _BOARD,
    "wandb": _BOARD,
    "csv_monitor": _BOARD,
    "comet": _BOARD,
    "activation_checkpointing": "it acts on DeepSpeed's own checkpointing, which is not used here; the recipe's "
    "model.gradient_checkpointing is",
    "compile": "model.compile has the model's blocks compiled",
    "gradient_allreduce_op": "the loss is already divided by all target tokens of the step, which needs the mean over "
    "ranks that DeepSpeed takes by default",
    "managed_gradient_accumulation": "the recipe's packing determines where a step ends",
    "dataloader_drop_last": "the data come from the recipe's stream, not from DeepSpeed's loader",
    "data_efficiency": "the data come from the recipe's stream, not from DeepSpeed's sampler",
    "sequence_parallel_size": "samples are too short to be worth dividing",
    "tensor_parallel": "the model is not divided within a layer",
    "expert_parallel": "the model has no experts",
    "use_data_before_expert_parallelism": "the model has no experts",
    "pipeline": "the model is not divided into a pipeline",
    "hybrid_engine": "it is for reinforcement learning",
    "autotuning": "use 'tinygptv-ds estimate' and --dry-run",
    "weight_quantization": "it is for inference",
    "bfloat16": "write bf16",
    "amp": _REMOVED,
    "nebula": _REMOVED,
    "elasticity": f"{_REMOVED}; a checkpoint here resumes on any number of ranks as it is",
    "compression_training": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_gradients": _REMOVED,
    "sparse_attention": _REMOVED,
    "eigenvalue": _REMOVED,
    "graph_harvesting": _REMOVED,
    "curriculum_learning": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "bf16.bf16_master_weights_and_grads": _MASTERS,
    "bf16.bf16_optimizer_states": _MASTERS,
    "fp16.fp16_master_weights_and_grads": _MASTERS,
    "zero_optimization.compute_grad_norm": "the norm is logged, and stops a step whose gradient is not finite",
    "zero_optimization.zenflow": _OWN_ADAM,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the optimizer here is AdamW",
    "zero_optimization.elastic_checkpoint": "checkpoints here resume on any number of ranks as they are",
    "zero_optimization.legacy_stage1": "DeepSpeed is about to drop it",
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "write pin_memory in offload_param and offload_optimizer",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "write stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.mics_shard_size": f"{_REMOVED}; zero_hpz_partition_size comes closest",
    "zero_optimization.mics_hierarchical_params_gather": f"{_REMOVED}; zero_hpz_partition_size comes closest",
    "zero_optimization.zeropp_loco_param": _REMOVED,
    "zero_optimization.offload_optimizer.super_offload": _OWN_ADAM,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _OWN_ADAM,
}
