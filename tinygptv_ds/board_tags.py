"""Tags of metrics on TensorBoard, which shows its groups in alphabetical order: the loss first, images last."""

from __future__ import annotations

LOSS, SCORES, BY_DATASET, OPTIMIZER = "1_loss", "2_scores", "3_loss_by_dataset", "4_optimizer"
PERFORMANCE, DATA, MIRROR, SAMPLES = "5_perf", "6_data", "7_mirror", "8_samples"
_GROUPS = {"eval": SCORES, "train": OPTIMIZER, "perf": PERFORMANCE, "data": DATA, "mirror": MIRROR}
_LOSSES = {"train/loss": f"{LOSS}/train", "val/loss": f"{LOSS}/val"}
_NOT_DATASETS = ("train/loss_scale",)


def board_tag(metric: str) -> str:
    """Return the tag of a metric, e.g. 1_loss/train for train/loss, 3_loss_by_dataset/val_vqa for val/loss_vqa."""
    group, _, name = metric.partition("/")
    if metric in _LOSSES:
        return _LOSSES[metric]
    if name.startswith("loss_") and group in ("train", "val") and metric not in _NOT_DATASETS:
        return f"{BY_DATASET}/{group}_{name.removeprefix('loss_')}"
    return f"{_GROUPS[group]}/{name}" if group in _GROUPS else metric
