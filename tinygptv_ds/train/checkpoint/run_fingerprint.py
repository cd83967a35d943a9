"""The fingerprint of a run: what a resumed run must share with it, as plain values by name; imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinygptv_ds.config.data_section import DataSection
from tinygptv_ds.config.load import dotted_values, recipe_dict
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.stream.plan import OpenStream
from tinygptv_ds.features.format import read_notes

# What changes no number of a run: how it is computed, reported and kept. Not paths are compared but their contents.
LEFT_OUT = {
    "model": ("phi", "eva_vit", "qformer", "init_from", "attention", "compile", "gradient_checkpointing"),
    "data": (
        "only",
        "num_workers",
        "max_skipped_share",
        "validation",
        "cache_dir",
        "cache_gb",
        "allow_pipe",
        "read_timeout_seconds",
        "features",
    ),
    "train": (
        "micro_batch_size",
        "max_tokens",
        "cuda_graph_tokens",
        "log_every",
        "sample_every",
        "sample_count",
        "validate_every",
        "validation_samples",
        "max_overflows",
        "trackers",
        "tracker_project",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep_checkpoints",
        "keep_every",
        "keep_best",
        "patience",
        "result",
        "deepspeed_checkpoints",
        "mirror",
        "startup_minutes",
        "step_minutes",
        "slow_step_seconds",
        "lost_after_seconds",
    ),
}
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens")
_IRRELEVANT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "auto_map")
_BLOCK, _BLOCKS = 4096, 64


def run_fingerprint(recipe: Recipe, stream: OpenStream) -> dict[str, Any]:
    """Return the recipe's values by dotted key, and hashes for its samples, base weights and tokenizer.

    A dataset is known by the names of its shards and their numbers of samples; a weight file by its size and 64 blocks
    of 4 KiB spread over it (a change of a few bytes elsewhere goes unseen; hashing 8 GB whole would take longer than a
    step).
    """
    return {**_recipe_values(recipe), **_datasets(recipe.data, stream), **_base_weights(recipe)}


def _recipe_values(recipe: Recipe) -> dict[str, Any]:
    plain = recipe_dict(recipe)
    for section in ("deepspeed", "evaluation"):
        plain.pop(section)
    for section, names in LEFT_OUT.items():
        for name in names:
            plain[section].pop(name)
    # Those that are used count, whether the others are left out by `data.only` or not listed.
    used = {section.name: dataclasses.asdict(section) for section in recipe.data.used}
    plain["data"]["datasets"] = {
        name: {"weight": each["weight"], "clean": each["clean"]} for name, each in used.items()
    }
    return {key: value for key, value in dotted_values(plain).items() if value != {}}  # as earlier checkpoints have it


def _datasets(data: DataSection, stream: OpenStream) -> dict[str, str]:
    hashes = {}
    for name, shards in stream.shards.items():
        names = [shard.name for shard in shards]
        if data.features is not None:  # the same samples under other names
            names = [source["name"] for source in read_notes(Path(data.features) / name).sources]
        counts = stream.orders[name].counts.tolist()
        digest = hashlib.sha256(json.dumps([names, counts]).encode()).hexdigest()
        hashes[f"samples of {name}"] = f"{sum(counts)} in {len(counts)} shard(s), {digest[:16]}"
    return hashes


def _base_weights(recipe: Recipe) -> dict[str, str | None]:
    model, phi = recipe.model, Path(recipe.model.phi)
    init_from = None if model.init_from is None else _weights_under(Path(model.init_from))
    return {
        "weights of model.phi": _sampled(_weights_under(phi)),
        "weights of model.eva_vit": _sampled(_weights_under(Path(model.eva_vit))),
        "weights of model.qformer": _sampled(_weights_under(Path(model.qformer))),
        "weights of model.init_from": None if init_from is None else _sampled(init_from),
        "configuration of model.phi": _configuration(phi / "config.json"),
        "tokenizer of model.phi": _whole(file for file in phi.iterdir() if file.name.startswith(_TOKENIZER)),
    }


def _weights_under(path: Path) -> list[Path]:
    """Return the weight files of a path that a recipe names: a file, a folder of them, a run directory."""
    if path.is_file():
        return [path]
    for trained in (path / "model/trained.safetensors", path / "trained.safetensors"):
        if trained.is_file():
            return [trained]
    return sorted(file for file in path.rglob("*") if file.suffix in _WEIGHTS and file.is_file())


def _sampled(files: Iterable[Path]) -> str:
    digest, size = hashlib.sha256(), 0
    for path in files:
        length = path.stat().st_size
        digest.update(f"{length}\n".encode())
        size += length
        with path.open("rb") as file:
            for number in range(_BLOCKS + 1):  # the first and the last bytes are among them
                file.seek(max(0, (length - _BLOCK) * number // _BLOCKS))
                digest.update(file.read(_BLOCK))
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def _whole(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _configuration(path: Path) -> str:
    """Return a hash of what matters in config.json."""
    values = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key not in _IRRELEVANT}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
