"""The data section of a recipe: which datasets, in what shares, from where. Checked before torch is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tinygptv_ds.config.limits import check_limits
from tinygptv_ds.config.nearest import nearest
from tinygptv_ds.errors import require, shown

_NAME = re.compile(r"[\w+][\w.+ -]{0,99}")


def check_name(name: str, what: str) -> None:
    """Check a name that becomes part of file names and of TensorBoard's tags."""
    require(
        _NAME.fullmatch(name) is not None,
        f"{what} {shown(name)} must consist of letters, digits and . _ + - (100 characters at most, not . first)",
    )


_BACKGROUND = re.compile(r"[A-Za-z]+|#[0-9A-Fa-f]{6}")


@dataclass(frozen=True)
class DatasetSection:
    """One dataset of the mixture."""

    name: str
    """Name in logs and on TensorBoard."""

    shards: str
    """A folder, a glob or a brace pattern of tars, relative to the working directory; or the same as a URL that fsspec
    knows (`https://`, `s3://`, ...; a folder ends in `/`), or `pipe:COMMAND`, whose output is a tar. Braces are best
    for URLs: they need no listing."""

    weight: float = 1.0
    """Share of the samples, relative to the others' (published: sampling ratio x batch size)."""

    clean: bool = True
    """Whether to apply the original's text cleaning to the fields that the original cleans."""

    background: str = "auto"
    """A color (a name, or `#rrggbb`): images are turned upright by their EXIF orientation, and transparent pixels laid
    on it. none: as in the original, which ignores the orientation and drops alpha. auto: none for datasets with the
    name of one of the original's, white for all others."""

    def __post_init__(self) -> None:
        check_name(self.name, "data.datasets: name")
        require(self.weight > 0, f"data.datasets, {self.name}: weight must be positive")
        require(
            _BACKGROUND.fullmatch(self.background) is not None,
            f"data.datasets, {self.name}: background must be auto, none, a color's name or #rrggbb, "
            f"not {shown(self.background)}",
        )
        check_limits(f"data.datasets, {self.name}", self, weight=1e9)


@dataclass(frozen=True)
class DataSection:
    """The stream of samples."""

    datasets: list[DatasetSection]
    """The datasets of the mixture. Their weights are shares of the samples (published: sampling ratio x batch size)."""

    only: list[str] = field(default_factory=list)
    """Names of the datasets that this run uses, with their weights as listed, e.g. [cc_sbu]; empty: all."""

    homogeneous: bool = False
    """Whether every step holds one dataset, drawn by weight; in the original each rank draws one for itself."""

    validation: list[DatasetSection] = field(default_factory=list)
    """Datasets for the validation loss and the sample panel; empty: no validation loss, and a panel of the training
    sets' first samples."""

    num_workers: int = 2
    """Dataloader workers per rank, whatever the number of datasets, and no more than the rank has cores; 0 loads in the
    training process."""

    shuffle_shards: int = 16
    """Samples are shuffled within windows of this many shards."""

    validation_share: float = 0.0
    """Share of every training dataset (the last samples of each shard) that is held out and used as `validation` is."""

    max_skipped_share: float = 0.01
    """The run stops once more than this share of the samples was skipped."""

    cache_dir: str | None = None
    """Where remote shards are kept, best on a local disk of each node, whose processes share it; null:
    `~/.cache/tinygptv_ds/shards`, or its like under `$XDG_CACHE_HOME`."""

    cache_gb: float = 100.0
    """Remote shards kept at most, in 10^9 bytes; best several windows of `shuffle_shards` of every dataset."""

    allow_pipe: list[str] = field(default_factory=list)
    """Names of the datasets whose shards may be `pipe:` commands; each runs in a shell."""

    decoding: str = "exact"
    """exact: the original's pixels; fast: JPEGs of at least twice the input size are decoded at a fraction of theirs,
    which changes pixels by 1 to 3 of 255 on average. Inference and evaluation are always exact."""

    read_timeout_seconds: float = 600.0
    """A dataloader worker that has not delivered a micro-batch after this many seconds is killed and restarted; choose
    more than the slowest fetch of a remote shard takes. 0: no limit."""

    features: str | None = None
    """Folder that `tinygptv-ds features` wrote for these datasets: train from these outputs of ViT and Q-Former instead
    of images; null: read images."""

    def __post_init__(self) -> None:
        check_limits("data", self, num_workers=1024, shuffle_shards=1_000_000, cache_gb=1e9, read_timeout_seconds=1e8)
        require(bool(self.datasets), "data.datasets is empty: name at least one dataset")
        names = [d.name for d in self.datasets]
        twice = sorted({n for n in names if names.count(n) > 1})
        require(not twice, f"data.datasets: {', '.join(twice)} appears more than once; names must differ")
        for name in self.only:
            require(name in names, f"data.only: {shown(name)} is none of data.datasets{nearest(name, names)}")
        require(self.num_workers >= 0, "data.num_workers must be 0 or more")
        require(self.shuffle_shards > 0, "data.shuffle_shards must be positive")
        require(0 <= self.max_skipped_share <= 1, "data.max_skipped_share must be in [0, 1]")
        require(0 <= self.validation_share < 1, "data.validation_share must be in [0, 1)")
        require(
            not (self.validation and self.validation_share),
            "data.validation names datasets, and data.validation_share holds some back for the same use: "
            "give one of the two",
        )
        require(self.cache_gb > 0, "data.cache_gb must be positive")
        require(self.read_timeout_seconds >= 0, "data.read_timeout_seconds must be 0 or more")
        everyone = [*self.datasets, *self.validation]
        odd = sorted(set(self.allow_pipe) - {d.name for d in everyone})
        require(not odd, f"data.allow_pipe: {shown(odd)} is no dataset of data.datasets or data.validation")
        piped = sorted({d.name for d in everyone if d.shards.startswith("pipe:")} - set(self.allow_pipe))
        require(
            not piped,
            f"data.datasets: the shards of {', '.join(piped)} are pipe: commands, which run in a shell with all your "
            f"rights; if you trust this recipe, --set data.allow_pipe=[{','.join(piped)}]",
        )
        require(self.decoding in ("exact", "fast"), f"data.decoding: {shown(self.decoding)} is not one of exact, fast")

    @property
    def has_validation(self) -> bool:
        """Whether there are samples that are not trained on."""
        return bool(self.validation) or self.validation_share > 0

    @property
    def used(self) -> list[DatasetSection]:
        """The datasets that are trained on, in the order of the recipe."""
        return [dataset for dataset in self.datasets if not self.only or dataset.name in self.only]
