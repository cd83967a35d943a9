"""Bytes that the ranks of a run send each other in a step: the counts of traffic_counts.py next to measured ones.

The tests' tiny model, with a LoRA large enough that its tensors outweigh TCP's headers, trains on the CPU under each
set-up. Rank 0 records the bytes of every collective; the table shows them next to the counts. Where network namespaces
are allowed, the bytes on the wire are also compared with those of a ring.

    python benchmarks/traffic.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.setups import ROOT, Setup, mixed_recipe, run
from benchmarks.traffic_counts import SMALL, Collective, Zero, step_of, step_traffic
from benchmarks.zero3_gathers import Limits
from tinygptv_ds.config.deepspeed import load_deepspeed_json, precision, resolve_deepspeed, zero_stage
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.weights.assemble import model_config

WARM_UP = 2  # steps in which ZeRO-3 still records the order in which weights are used
OWN_NAMESPACE = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"')
SIZES = ("model.lora_r=512", "model.proj_hidden_size=2048", "model.resid_dropout=0.1")
_ZERO_3 = "deepspeed.zero_optimization.stage3_"
FINE = (  # as in the published model, a part of the weights stays whole, a part is kept, a part is gathered twice
    f"{_ZERO_3}param_persistence_threshold=1000",
    f"{_ZERO_3}max_reuse_distance=100000",
    f"{_ZERO_3}prefetch_bucket_size=20000",
    f"{_ZERO_3}max_live_parameters=150000",
)
HPZ = "deepspeed.zero_optimization.zero_hpz_partition_size=2"
SETUPS = (
    Setup("ZeRO-1", "bf16", 2, "zero1_bf16", SIZES),
    Setup("ZeRO-2", "bf16", 2, "zero2_bf16", SIZES),
    Setup("ZeRO-2", "bf16", 4, "zero2_bf16", (*SIZES, "train.micro_batch_size=1")),
    Setup("ZeRO-2", "fp32", 2, "cpu", SIZES),
    Setup("ZeRO-3", "bf16", 2, "zero3_bf16", (*SIZES, *FINE)),
    Setup("ZeRO-3, recomputing", "bf16", 2, "zero3_bf16", (*SIZES, *FINE, "model.gradient_checkpointing=2")),
    Setup("ZeRO-3", "bf16", 4, "zero3_bf16", (*SIZES, *FINE, "train.micro_batch_size=1")),
    Setup("ZeRO-3, hpZ of 2", "bf16", 4, "zero3_bf16", (*SIZES, *FINE, HPZ, "train.micro_batch_size=1")),
    Setup("ZeRO-3, CPU offload", "bf16", 2, "zero3_offload", (*SIZES, *FINE)),
)


@dataclass(frozen=True)
class Row:
    """One set-up: bytes of a step by collective, counted and measured, and those on the wire.

    Attributes:
        setup: the set-up's name and number of ranks.
        counted: counted payload by `key`.
        measured: payload of the collectives that rank 0 called in each step after the warm-up, by `key`.
        ring: bytes that all ranks together send in rings, by count, where gloo's reduce-scatter is an all-reduce.
        wire: bytes that they sent, headers and acknowledgements included; None where it could not be measured.
    """

    setup: str
    counted: dict[str, int]
    measured: dict[str, int]
    ring: float
    wire: float | None


def main() -> None:
    """Run every set-up and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    namespace = _namespaces_are_allowed()
    with tempfile.TemporaryDirectory() as folder:
        recipe = mixed_recipe(Path(folder))
        rows = [_measured(setup, recipe, Path(folder) / str(n), namespace) for n, setup in enumerate(SETUPS)]
    print("\n".join([*payload_table(rows), "", *wire_table(rows)]))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def counted_payload(collectives: list[Collective]) -> dict[str, int]:
    """Return the payload by `key`."""
    payload: Counter[str] = Counter()
    for each in collectives:
        payload[key(each.what, each.kind, each.ranks)] += each.payload
    return dict(payload)


def sent_by_gloo(each: Collective) -> float:
    """Return the bytes that a rank sends over gloo, whose reduce-scatter torch implements as an all-reduce."""
    return 2 * each.sent if each.kind == "reduce_scatter" else each.sent


def zero_of(config: dict[str, Any]) -> Zero:
    """Return the settings of a DeepSpeed JSON that decide about traffic, with DeepSpeed's defaults filled in."""
    zero = config["zero_optimization"]
    stage3 = {
        "persistence": ("param_persistence_threshold", 100_000),
        "reuse": ("max_reuse_distance", 1_000_000_000),
        "prefetch": ("prefetch_bucket_size", 50_000_000),
        "live": ("max_live_parameters", 1_000_000_000),
    }
    given = {name: int(zero.get(f"stage3_{word}", default)) for name, (word, default) in stage3.items()}
    mixed = config.get("torch_autocast", {}).get("enabled", False)
    frozen, trained = (2, 4) if mixed else (4, 4) if precision(config) == "fp32" else (2, 2)
    node, offloaded = int(zero.get("zero_hpz_partition_size", 1)), "offload_optimizer" in zero
    stage = zero_stage(config)
    return Zero(stage, frozen, trained, Limits(**given) if stage == 3 else Limits(), node, offloaded)


def key(what: str, kind: str, ranks: int) -> str:
    """Return the name of a row; the small collectives, all of them all-reduces, share one."""
    return what if what == SMALL else f"{what}, {kind} over {ranks}"


def measured_payload(notes: dict[str, Any], step: int) -> dict[str, int]:
    """Return the payload of one step by `key`, from what `collectives.note` has written."""
    payload: Counter[str] = Counter()
    for what, kind, size, ranks in notes["steps"][step]:
        payload[key(what, kind, ranks)] += size
    return dict(payload)


def _measured(setup: Setup, recipe_file: Path, run_dir: Path, namespace: bool) -> Row:
    recipe = load_recipe(recipe_file, list(setup.changes))
    config = load_deepspeed_json(ROOT / f"ds_configs/{setup.json_file}.json")
    zero = zero_of(resolve_deepspeed(config, recipe, setup.ranks, setup.name))
    collectives = step_traffic(step_of(recipe, model_config(recipe.model, recipe.text), setup.ranks), zero)
    recorded = run_dir.with_suffix(".json")
    prefix = OWN_NAMESPACE if namespace else ()
    env = {"COLLECTIVES_FILE": str(recorded)}
    run(setup, recipe_file, run_dir, script="benchmarks/collectives.py", prefix=prefix, env=env)
    notes = json.loads(recorded.read_text(encoding="utf-8"))
    last = len(notes["steps"]) - 1  # left out: its bytes on the wire are unknown, and it ends with a checkpoint
    payloads = [measured_payload(notes, step) for step in range(WARM_UP, last)]
    assert all(payload == payloads[0] for payload in payloads), f"{setup.name}: steps differ: {payloads}"
    wire = (notes["loopback"][last] - notes["loopback"][WARM_UP]) / (last - WARM_UP) if namespace else None
    sent = setup.ranks * sum(map(sent_by_gloo, collectives))
    name = f"{setup.name}, {setup.precision}, {setup.ranks} ranks"
    return Row(name, counted_payload(collectives), payloads[0], sent, wire)


def payload_table(rows: list[Row]) -> list[str]:
    """Return the lines of a Markdown table of counted and measured payloads."""
    lines = ["| set-up | collective | counted | measured |", "|-|-|-|-|"]
    for row in rows:
        for name in dict.fromkeys([*row.counted, *row.measured]):
            counted, measured = row.counted.get(name, 0), row.measured.get(name, 0)
            lines.append(f"| {row.setup} | {name} | {counted:,} | {measured:,} |")
    return lines


def wire_table(rows: list[Row]) -> list[str]:
    """Return the lines of a Markdown table of all ranks' bytes of a step, in rings and on the wire."""
    lines = ["| set-up | in rings, by count | on the wire | |", "|-|-|-|-|"]
    for row in rows:
        if row.wire is None:
            return ["bytes on the wire: not measured, network namespaces are not allowed here"]
        lines.append(f"| {row.setup} | {row.ring:,.0f} | {row.wire:,.0f} | {row.wire / row.ring - 1:+.1%} |")
    return lines


def _namespaces_are_allowed() -> bool:
    try:
        return subprocess.run([*OWN_NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    main()
