"""The split of a dataset into training and held-out samples, by image: no image is on both sides."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from operator import length_hint
from pathlib import Path

from tinygptv_ds.data.sets.common import Entry, PreparedSample
from tinygptv_ds.errors import DataError

TRAIN, HELD_OUT = "train", "held_out"  # the folders of the two sides, below --out


def parse_amount(text: str) -> float | int:
    """Read the value of ``--held-out``: a share of the samples below 1, or a number of samples from 1 on."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 < value < 1:
        return value
    if value >= 1 and value.is_integer():
        return int(value)
    raise DataError(f"--held-out must be a share of the samples such as 0.1, or a number of samples, not {text!r}")


@dataclass(frozen=True)
class Split:
    """A division of samples; build it with `split_by_image`.

    `base` is the folder of the images, to which the hashes of their paths are relative. `linked` maps the hash of an
    image that shares samples with other images to the hash that represents all of them. `held_out` holds the hashes of
    the held-out groups.
    """

    base: str
    linked: dict[int, int]
    held_out: frozenset[int]

    def is_held_out(self, entry: Entry) -> bool:
        """Return the side of an entry; skipped entries belong to the training side."""
        if not isinstance(entry, PreparedSample):
            return False
        first = _hashes(entry, self.base)[0]
        return self.linked.get(first, first) in self.held_out

    def choose(self, samples: Iterable[Entry], side: str) -> "Side":
        """Return the samples of one side, `TRAIN` or `HELD_OUT`."""
        return Side(samples, self, side == HELD_OUT)


class Side(Iterator[Entry]):
    """The samples of one side of a split; the number of samples to come is that of both sides, an upper bound."""

    def __init__(self, samples: Iterable[Entry], split: Split, held_out: bool) -> None:
        self._samples = iter(samples)
        self._split, self._held_out = split, held_out

    def __next__(self) -> Entry:
        return next(entry for entry in self._samples if self._split.is_held_out(entry) == self._held_out)

    def __length_hint__(self) -> int:
        return length_hint(self._samples, 0)


def split_by_image(samples: Iterable[Entry], base: Path, amount: float | int) -> Split:
    """Choose the held-out samples: about `amount` (a share below 1, or a number) of `samples`.

    Groups of samples that share an image stay together, also where they share it through others; samples without an
    image are grouped by their text. The groups with the smallest hashes are held out, so that the choice depends on
    the annotations alone, not on workers, order or the place of the files. Memory: about 100 bytes for each image.

    Raises DataError if there are fewer than two groups, or if nothing would be left to train on.
    """
    counts: Counter[int] = Counter()
    linked: dict[int, int] = {}
    prefix = str(base)
    for entry in samples:
        if isinstance(entry, PreparedSample):
            hashes = _hashes(entry, prefix)
            counts[hashes[0]] += 1
            if len(hashes) > 1:
                _link(linked, hashes)
    linked = {image: _representative(linked, image) for image in linked}
    groups: Counter[int] = Counter()
    for image, count in counts.items():
        groups[linked.get(image, image)] += count
    total = groups.total()
    wanted = amount * total if amount < 1 else amount
    if len(groups) < 2 or wanted >= total:
        raise DataError(
            f"--held-out {amount}: {total} sample(s) of {len(groups)} different image(s) leave nothing to train on; "
            f"hold out fewer, or prepare without --held-out"
        )
    held_out, number = set(), 0
    for group in sorted(groups):
        after = number + groups[group]
        if after < total and abs(after - wanted) < abs(number - wanted):
            held_out.add(group)
            number = after
    if not held_out:  # each of them has far more samples than wanted
        held_out.add(min(groups, key=lambda group: (groups[group], group)))
    return Split(prefix, linked, frozenset(held_out))


def _hashes(sample: PreparedSample, base: str) -> list[int]:
    """Return the hashes of a sample's images, or that of its text if it has none."""
    if not sample.images:
        text = {field: value for field, value in sample.record.items() if field != "id"}
        return [_hash(json.dumps(text, sort_keys=True).encode())]
    return [
        _hash(image if isinstance(image, bytes) else str(image).removeprefix(base).encode(errors="surrogatepass"))
        for image in sample.images
    ]


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


def _link(linked: dict[int, int], hashes: list[int]) -> None:
    """Make the images of one sample a single group, with whatever they were linked to before (union-find)."""
    roots = [_representative(linked, image) for image in hashes]
    smallest = min(roots)
    linked.update(dict.fromkeys(roots, smallest))
    linked.update(dict.fromkeys(hashes, smallest))


def _representative(linked: dict[int, int], image: int) -> int:
    """Follow the links of an image to the end, and shorten them for the next time."""
    path = []
    while (following := linked.get(image, image)) != image:
        path.append(image)
        image = following
    linked.update(dict.fromkeys(path, image))
    return image
