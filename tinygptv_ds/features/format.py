"""Features in place of images: what a frozen ViT and Q-Former made of each, in shards next to the text. No torch.

`ROOT/<dataset>/` has as many tars as the dataset, with the same keys in the same order, so that the order of the stream
and every random draw are those of training from images. A sample holds its `.json` byte for byte and, for each
image, `.fp32`, `.bf16` or `.fp16` (`.0.fp32`, `.1.fp32`, ... where there are several): `[queries, width]`, little
endian. One that cannot be used holds `.skipped.json` with the reason. `features.json` records what the features were
made with and from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinygptv_ds.config.data_section import DatasetSection
from tinygptv_ds.data.shards.members import FEATURE_BYTES
from tinygptv_ds.data.shards.patterns import expand_shards
from tinygptv_ds.data.shards.remote import Shard
from tinygptv_ds.errors import DataError
from tinygptv_ds.files import fingerprint_differences, whole_file

NOTES = "features.json"
FORMAT = 1
SIXTEEN_BIT = "sixteen_bit"  # how 16-bit features were computed; those made under autocast have no such entry
HOW = "tinygptv-ds features RECIPE --out DIR"


@dataclass(frozen=True)
class FeatureShape:
    """The layout of one image's features in their member.

    Attributes:
        dtype: "fp32", "bf16" or "fp16".
        queries: rows.
        width: of a row, the Q-Former's.
    """

    dtype: str
    queries: int
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of one image's features."""
        return self.queries * self.width * FEATURE_BYTES[self.dtype]


@dataclass(frozen=True)
class FeatureNotes:
    """What `features.json` of a dataset says.

    Attributes:
        made_with: everything that the features depend on, from `verify.vision_fingerprint`.
        sources: `name`, `bytes` and `samples` of each shard that they were made from.
        shard_bytes: size of each tar of features; empty until all are written.
    """

    made_with: dict[str, Any]
    sources: list[dict[str, Any]]
    shard_bytes: list[int]

    @property
    def shape(self) -> FeatureShape:
        """The layout of the features in their members."""
        return FeatureShape(self.made_with["dtype"], self.made_with["queries"], self.made_with["width"])


def fingerprint(made_with: Mapping[str, Any]) -> str:
    """SHA-256 of everything that features depend on."""
    return hashlib.sha256(json.dumps([FORMAT, dict(made_with)], sort_keys=True).encode()).hexdigest()


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return what two `made_with` disagree in; weights only alone, since another dtype or size changes them too."""
    differing = fingerprint_differences(there, here)
    if differing.keys() == {"weights"}:
        return ["the weights of the ViT and the Q-Former"]
    if SIXTEEN_BIT in differing and "dtype" not in differing:
        differing[SIXTEEN_BIT] = (
            "how 16 bits are computed (an earlier version ran the ViT under autocast, with LayerNorms in fp32; now it "
            "runs in the dtype of its weights)"
        )
    elif SIXTEEN_BIT in differing:
        del differing[SIXTEEN_BIT]  # a consequence of the other dtype
    return [line for name, line in differing.items() if name != "weights"]


def refuse_stale(folder: Path, here: Mapping[str, Any]) -> None:
    """See that the features of a dataset are those that this vision path would make.

    Raises:
        DataError: they are not; says in what they differ and how to make them again.
    """
    differing = differences(read_notes(folder).made_with, here)
    if differing:
        raise DataError(
            f"{folder} holds stale features: they differ from what this recipe's vision path gives in "
            f"{', '.join(differing)}. Make them again in another folder: {HOW}"
        )


def shards_of(section: DatasetSection, root: str | None, *, allow_pipe: bool = False) -> list[Shard]:
    """Return the tars that a dataset is read from: its own, or those of its features below `root`.

    Raises:
        DataError: a tar is missing or torn, the features are unfinished, or the dataset's own shards, where they are
            still there, are no longer those that the features were made from.
    """
    if root is None:
        return expand_shards(section.shards, allow_pipe=allow_pipe)
    folder = Path(root) / section.name
    notes = read_notes(folder)
    if len(notes.shard_bytes) != len(notes.sources):
        raise DataError(f"{folder}: the features are unfinished; run the same command again to continue: {HOW}")
    tars = [folder / tar_name(number) for number in range(len(notes.sources))]
    for tar, size in zip(tars, notes.shard_bytes, strict=True):
        found = tar.stat().st_size if tar.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"is torn ({found:,} bytes instead of {size:,})"
            raise DataError(f"{tar} {state}; run the same command again to repair it: {HOW}")
    _same_sources(section, folder, notes, allow_pipe)
    return list(tars)


def tar_name(number: int) -> str:
    """Return the file of shard `number`."""
    return f"{number:05d}.tar"


def source_of(tar: Shard, samples: int) -> dict[str, Any]:
    """Return one entry of `FeatureNotes.sources`; of a remote shard the size is unknown."""
    return {"name": tar.name, "bytes": _size(tar), "samples": samples}


def read_notes(folder: Path) -> FeatureNotes:
    """Read `features.json` of this folder.

    Raises:
        DataError: it is missing, damaged, or of another version of this program.
    """
    path = folder / NOTES
    try:
        raw = json.loads(path.read_bytes())
        if raw.pop("format") != FORMAT:
            raise DataError(f"{path} is of another version of this program; make the features again: {HOW}")
        written = raw.pop("fingerprint")
        notes = FeatureNotes(**raw)
        if written != fingerprint(notes.made_with):
            raise ValueError("altered since it was written")
    except FileNotFoundError:
        raise DataError(f"{folder} holds no features (no {NOTES}); make them with {HOW}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); make the features again: {HOW}") from None
    return notes


def write_notes(folder: Path, notes: FeatureNotes) -> None:
    """Write `features.json`, whole."""
    content = {"format": FORMAT, "fingerprint": fingerprint(notes.made_with), **asdict(notes)}
    with whole_file(folder / NOTES) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _size(tar: Shard) -> int | None:
    return tar.stat().st_size if isinstance(tar, Path) else None


def _same_sources(section: DatasetSection, folder: Path, notes: FeatureNotes, allow_pipe: bool) -> None:
    """Check that images which are still there are the same; they may have been removed to save space."""
    try:
        tars = expand_shards(section.shards, allow_pipe=allow_pipe)
    except DataError:
        return
    here = [(tar.name, _size(tar)) for tar in tars]
    there = [(source["name"], source["bytes"]) for source in notes.sources]
    if here != there:
        odd = next((tar for tar, mine, other in zip(tars, here, there, strict=False) if mine != other), None)
        what = f"{odd} is another" if odd else f"there are {len(here)} shards instead of {len(there)}"
        raise DataError(
            f"dataset {section.name}: {section.shards} is not what {folder} was made from ({what}); make the features "
            f"again: {HOW}"
        )
