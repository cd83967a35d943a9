"""The data section of a recipe: which datasets, in what shares, from where. Checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field

from tinygptv_ds.config.nearest import nearest
from tinygptv_ds.errors import require


@dataclass(frozen=True)
class DatasetSection:
    """One dataset of the mixture.

    Attributes:
        name: its name in logs and on TensorBoard.
        shards: a folder, a glob or a brace pattern of tars, relative to the working directory; or the same
            as a URL that fsspec knows (``https://``, ``s3://``, ...; a folder ends in ``/``), or ``pipe:COMMAND``,
            whose output is a tar. Braces are best for these: they need no listing.
        weight: its share of the samples, relative to the others' (published: sampling ratio x batch size).
        clean: apply the original's text cleaning to the fields that the original cleans.
    """

    name: str
    shards: str
    weight: float = 1.0
    clean: bool = True

    def __post_init__(self) -> None:
        require(self.weight > 0, f"data.datasets, {self.name}: weight must be positive")


@dataclass(frozen=True)
class DataSection:
    """The stream of samples.

    Attributes:
        datasets: what is mixed.
        only: names of those of `datasets` that this run uses, with their weights as listed; empty: all.
        homogeneous: every step holds one dataset, drawn by weight; in the original each rank draws one for itself.
        validation: datasets for the validation loss and the panel of generated answers; empty: no validation loss,
            and the panel shows the training sets' first samples.
        num_workers: dataloader workers per rank, whatever the number of datasets, and no more than the rank has cores;
            0 loads in the training process.
        shuffle_shards: samples are shuffled within windows of this many shards.
        validation_share: of every training dataset, this share (the last samples of each shard) is kept from training
            and used as `validation` is.
        max_skipped_share: the run stops once more than this share of the samples seen was unreadable.
        cache_dir: where remote shards are kept, best on a local disk of each node, whose processes share it; None:
            `tinygptv_ds/shards` in the user's cache folder.
        cache_gb: 10^9 bytes of remote shards kept at most; best several windows of `shuffle_shards` of every dataset.
        allow_pipe: names of the datasets whose shards may be ``pipe:`` commands; each runs in a shell.
        decoding: "exact" gives the original's pixels; "fast" decodes JPEGs of twice the input size or more at a
            part of theirs, which moves pixels by 1 to 3 of 255 on average. Training only: inference and evaluation are
            always exact.
        read_timeout_seconds: a micro-batch that a dataloader worker has not given after so long: the process counts as
            hung, is killed and begun again; more than the slowest fetch of a remote shard takes. 0: no limit.
        features: folder that `python -m tinygptv_ds features` wrote for these datasets: they are read from there, with
            the outputs of ViT and Q-Former in place of images; None reads images.
    """

    datasets: list[DatasetSection]
    only: list[str] = field(default_factory=list)
    homogeneous: bool = False
    validation: list[DatasetSection] = field(default_factory=list)
    num_workers: int = 2
    shuffle_shards: int = 16
    validation_share: float = 0.0
    max_skipped_share: float = 0.01
    cache_dir: str | None = None
    cache_gb: float = 100.0
    allow_pipe: list[str] = field(default_factory=list)
    decoding: str = "exact"
    read_timeout_seconds: float = 600.0
    features: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.datasets), "data.datasets is empty: name at least one dataset")
        names = [d.name for d in self.datasets]
        twice = sorted({n for n in names if names.count(n) > 1})
        require(not twice, f"data.datasets: {', '.join(twice)} appears more than once; names must differ")
        for name in self.only:
            require(name in names, f"data.only: {name!r} is none of data.datasets{nearest(name, names)}")
        require(self.num_workers >= 0, "data.num_workers must be 0 or more")
        require(self.shuffle_shards > 0, "data.shuffle_shards must be positive")
        require(0 <= self.max_skipped_share <= 1, "data.max_skipped_share must lie in [0, 1]")
        require(0 <= self.validation_share < 1, "data.validation_share must lie in [0, 1)")
        require(
            not (self.validation and self.validation_share),
            "data.validation names datasets, and data.validation_share holds some back for the same use: "
            "give one of the two",
        )
        require(self.cache_gb > 0, "data.cache_gb must be positive")
        require(self.read_timeout_seconds >= 0, "data.read_timeout_seconds must be 0 or more")
        everyone = [*self.datasets, *self.validation]
        odd = sorted(set(self.allow_pipe) - {d.name for d in everyone})
        require(not odd, f"data.allow_pipe: {odd} is no dataset of data.datasets or data.validation")
        piped = sorted({d.name for d in everyone if d.shards.startswith("pipe:")} - set(self.allow_pipe))
        require(
            not piped,
            f"data.datasets: the shards of {', '.join(piped)} are pipe: commands, which run in a shell with all your "
            f"rights; if you trust this recipe, --set data.allow_pipe=[{','.join(piped)}]",
        )
        require(self.decoding in ("exact", "fast"), f"data.decoding: {self.decoding!r} is not one of exact, fast")

    @property
    def has_validation(self) -> bool:
        """Whether there are samples that are not trained on."""
        return bool(self.validation) or self.validation_share > 0

    @property
    def used(self) -> list[DatasetSection]:
        """The datasets that are trained on, in the order of the recipe."""
        return [dataset for dataset in self.datasets if not self.only or dataset.name in self.only]
