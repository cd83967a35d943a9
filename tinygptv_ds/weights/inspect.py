"""The verb `inspect`: what a file or folder of weights is, and whether it is complete."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.paths import require_path

if TYPE_CHECKING:
    from tinygptv_ds.weights.detect import Opened
    from tinygptv_ds.weights.source import Source

_SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument(
        "path",
        type=Path,
        metavar="FILE_OR_DIR",
        help="weights of Phi, of the EVA ViT or of BLIP-2, trained weights of TinyGPT-V in any form, a run, a "
        "checkpoint, or an exported model",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, with every key")


def run(args: argparse.Namespace) -> None:
    """Print the report of `inspect`.

    Raises:
        WeightsError: the weights are damaged, unknown, or not complete; in the last case the report is printed first.
    """
    require_path(args.path)
    report = inspect(args.path)
    print(json.dumps(asdict(report), indent=2) if args.json else report)
    if report.incomplete:
        raise WeightsError(f"{args.path} is not complete, or is not what it seems: {report.incomplete}")


@dataclass(frozen=True)
class WeightsPart:
    """One part of the model: its number of values, and their dtypes."""

    values: int
    dtypes: list[str]


@dataclass
class WeightsReport:
    """The findings of `inspect`.

    Attributes:
        path: the file or folder.
        container: its sort.
        kind: the model, or the part of one, that the weights belong to.
        files: SHA-256 of each file by its name; empty where `incomplete` is known from the names and shapes.
        released: the authors' released file that it is, or None.
        stage: the stage that trained it, with the reason; None for base models.
        layout: of the attention's weights, or the spelling of trained weights; None for other kinds.
        lora_r: LoRA's rank, 0 without LoRA.
        lora_targets: the linear layers that have LoRA.
        adapter: of an adapter of peft: its variant, scale and base; None for other files.
        qformer: whether it holds a Q-Former.
        also_contains: what else the file holds (optimizer, epoch, ...).
        parts: sizes of the model's parts.
        matched: canonical names that are there in the shape of a complete file.
        missing: names of a complete file that are not there.
        unexpected: names that a complete file does not have.
        wrong_shape: a sentence for each tensor of another shape.
        not_float: a sentence for each tensor of integers, whose scale is missing.
        not_finite: names in the file of tensors with NaN or Inf; looked for where names and shapes are right.
        ignored: names that are known and that nothing needs.
        incomplete: the reason why it cannot be used as it is, or "".
    """

    path: str
    container: str
    kind: str
    files: dict[str, str] = field(default_factory=dict)
    released: str | None = None
    stage: str | None = None
    layout: str | None = None
    lora_r: int = 0
    lora_targets: list[str] = field(default_factory=list)
    adapter: str | None = None
    qformer: bool = False
    also_contains: list[str] = field(default_factory=list)
    parts: dict[str, WeightsPart] = field(default_factory=dict)
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[str] = field(default_factory=list)
    not_float: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    incomplete: str = ""

    def __str__(self) -> str:
        rows = [
            ("path", self.path),
            ("container", self.container),
            ("kind", self.kind),
            ("released as", self.released or "none of the released files"),
            ("stage", self.stage),
            ("layout", self.layout),
            ("LoRA", f"rank {self.lora_r} on {', '.join(self.lora_targets)}" if self.lora_r else "none"),
            ("adapter", self.adapter),
            ("Q-Former", "yes" if self.qformer else "no"),
            ("also contains", ", ".join(self.also_contains) or None),
            *(("sha256", f"{digest}  {name}") for name, digest in self.files.items()),
            ("parameters", f"{sum(part.values for part in self.parts.values()):,}"),
            *(("", f"{part.values:>15,}  {name} ({', '.join(part.dtypes)})") for name, part in self.parts.items()),
            ("matched", str(len(self.matched))),
            *(
                (what, f"{len(names)}{': ' if names else ''}{_some(names)}")
                for what, names in (
                    ("missing", self.missing),
                    ("unexpected", self.unexpected),
                    ("wrong shape", self.wrong_shape),
                    ("integers", self.not_float),
                    ("NaN or Inf", self.not_finite),
                    ("ignored", self.ignored),
                )
                if names or what not in ("integers", "NaN or Inf")
            ),
        ]
        return "\n".join(f"{name:13} {text}" for name, text in rows if text is not None)


def inspect(path: Path) -> WeightsReport:
    """Examine weights without loading them, names and shapes first: values are read if those are right.

    Raises:
        WeightsError: they are damaged, or of no known kind.
    """
    from tinygptv_ds.weights.detect import canonical_source, open_any
    from tinygptv_ds.weights.io import listing
    from tinygptv_ds.weights.kinds import KINDS
    from tinygptv_ds.weights.layouts.expected_shapes import expected_shapes
    from tinygptv_ds.weights.opening import finite
    from tinygptv_ds.weights.provenance import hashes
    from tinygptv_ds.weights.released import released_by_hash
    from tinygptv_ds.weights.source import compare, lora_rank

    opened = open_any(path)
    source = canonical_source(opened, heads=1)
    report = WeightsReport(
        path=str(path),
        container=opened.container,
        kind=KINDS[opened.kind],
        stage=_stage(opened, source),
        layout=_layout(opened),
        lora_r=lora_rank(source.shapes),
        lora_targets=sorted({n.split(".lora_A.")[0].rpartition(".")[2] for n in source.weights if ".lora_A." in n}),
        qformer=any(name.startswith("qformer.") for name in source.weights),
        also_contains=_other_content(opened),
        parts=_parts(source),
        ignored=sorted(source.ignored),
    )
    try:
        report.adapter = _adapter(opened, source)
        found = compare(expected_shapes(opened.kind, source), source)
    except WeightsError as error:
        report.unexpected, report.incomplete = sorted(source.weights), str(error)
        return report
    report.matched, report.missing = found.matched, found.missing
    report.unexpected, report.wrong_shape = found.unexpected, found.wrong_shape
    report.not_float = found.not_float
    report.incomplete = str(found)
    if report.incomplete:
        return report
    report.files = hashes(opened.files)
    released = [file for digest in report.files.values() if (file := released_by_hash(digest))]
    report.released = f"{released[0].name} ({released[0].note})" if released else None
    report.not_finite = [name for name, stored in opened.stored.items() if not finite(stored)]
    if report.not_finite:
        report.incomplete = f"NaN or Inf in {listing(report.not_finite)}"
    return report


def _stage(opened: Opened, source: Source) -> str | None:
    from tinygptv_ds.weights.detect import guess_stage

    trained = opened.kind == "trained" or (opened.kind == "model" and "stage" in opened.notes)
    return str(guess_stage(opened, source)) if trained else None


def _adapter(opened: Opened, source: Source) -> str | None:
    """Describe an adapter of peft; raise WeightsError where TinyGPT-V cannot take it."""
    from tinygptv_ds.weights.peft_adapter import check_adapter_layers, is_adapter, read_adapter

    if opened.folder is None or not is_adapter(opened.folder):
        return None
    adapter = read_adapter(opened.folder, source.weights)
    check_adapter_layers(adapter)
    scale = f", as of lora_alpha {adapter.alpha:g}" if adapter.alpha is not None else ""
    return f"{adapter.variant}{scale}, on {adapter.base or 'a model that it does not name'}"


def _layout(opened: Opened) -> str | None:
    """Return the layout of Phi's attention, or how the names of trained weights are spelled."""
    from tinygptv_ds.weights.layouts.phi2 import layout
    from tinygptv_ds.weights.layouts.tinygptv import spelling

    if opened.kind == "phi":
        return layout(opened.stored, opened.path)
    return spelling(opened.stored) if opened.kind in ("trained", "projection", "model", "adapter") else None


def _other_content(opened: Opened) -> list[str]:
    """Name what `Opened.notes` holds, with the value where it is a plain one."""
    simple = {key: value for key, value in opened.notes.items() if isinstance(value, int | float | str)}
    return [f"{key} {simple[key]}" if key in simple else key for key in opened.notes]


def _parts(source: Source) -> dict[str, WeightsPart]:
    values: Counter[str] = Counter()
    dtypes: dict[str, set[str]] = {}
    for name, stored in source.weights.items():
        part = _part_of(name)
        values[part] += stored.numel
        dtypes.setdefault(part, set()).add(str(stored.dtype).removeprefix("torch."))
    return {part: WeightsPart(count, sorted(dtypes[part])) for part, count in values.items()}


def _part_of(name: str) -> str:
    from tinygptv_ds.models.parameters import lora, norms

    if lora(name):
        return "LoRA"
    if norms(name):
        return "norms of Phi"
    names = {"language_model": "Phi", "visual_encoder": "EVA ViT", "qformer": "Q-Former"}
    first = name.split(".")[0]
    return names.get(first, first)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
