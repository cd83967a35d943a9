"""Which members of a tar are one sample.

By webdataset's rule, neighbors whose names are the same up to the first dot of the base name. Tars that were made by
hand break it in three ways, which are undone here: the members of a sample are not adjacent (all records, then all
images; or the order of a folder), keys contain dots (``http.example.com.7.jpg``), or records and images are in folders
of their own (``json/7.json``, ``jpg/7.jpg``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from tinygptv_ds.data.shards.members import RECORD, SKIPPED, TEXTS, Member, is_image, is_record

log = logging.getLogger(__name__)

Samples = dict[str, list[Member]]  # key -> members
_NO_SAMPLES = ("Thumbs.db", "desktop.ini")


def split_name(name: str) -> tuple[str, str] | None:
    """Return (key, suffix) of a member's name, or None for a name that belongs to no sample.

    These are names that begin with a dot (among them AppleDouble's ``._x.jpg``), those in hidden folders, in
    ``__MACOSX`` or in ``PaxHeaders``, and files of Windows' Explorer.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not (stem and dot and suffix) or "\n" in suffix or base in _NO_SAMPLES:
        return None
    if folder and ("__MACOSX" in folder or "PaxHeaders" in folder or "." in folder):
        parts = folder.split("/")
        if any(part == "__MACOSX" or part.startswith("PaxHeaders") for part in parts):
            return None
        if any(part[:1] == "." and part not in (".", "..") for part in parts):
            return None
    return folder + slash + stem, suffix.lower()


def group(tar: Path, runs: Iterable[tuple[str, list[Member]]]) -> Samples:
    """Return the members of every sample, in the order of their first members.

    Of members that occur twice the first counts; of samples with the same key, too, unless they have no suffix in
    common: then they are parts of one sample.

    Args:
        tar: where they are, for warnings.
        runs: (key, members) of neighbors with the same key.
    """
    samples: Samples = {}
    dropped = []
    for key, members in runs:
        unique = list({member.suffix: member for member in reversed(members)}.values())[::-1]
        earlier = samples.setdefault(key, unique)
        if earlier is not unique:
            if {member.suffix for member in earlier} & {member.suffix for member in unique}:
                dropped.append(key)
                continue
            earlier += unique
        if len(unique) < len(members):
            dropped.append(key)
    if dropped:
        log.warning("%s: %d keys occur more than once, such as %s; the first is used", tar, len(dropped), dropped[0])
    return _joined_folders(tar, _split_dots(tar, samples))


def is_complete(members: Iterable[Member]) -> bool:
    """Return whether a sample has both a record or caption, and an image."""
    suffixes = [member.suffix for member in members]
    return any(map(is_record, suffixes)) and any(map(is_image, suffixes))


def _split_dots(tar: Path, samples: Samples) -> Samples:
    """Separate samples whose keys contain dots: every record begins a sample."""
    if not any(map(_record_stem, {member.suffix for members in samples.values() for member in members})):
        return samples
    found: Samples = {}
    split = []
    for key, members in samples.items():
        stems = {_record_stem(member.suffix) for member in members} - {""}
        apart = len(stems) > 1 or any(is_image(m.suffix) and _stem_among(stems, m.suffix)[0] for m in members)
        if not apart or any(is_record(member.suffix) for member in members):
            found[key] = members
            continue
        split.append(key)
        for member in members:
            stem, suffix = _stem_among(stems, member.suffix)
            found.setdefault(f"{key}.{stem}" if stem else key, []).append(member._replace(suffix=suffix))
    if split:
        log.warning(
            "%s: keys contain dots (such as those that begin with %r), where webdataset's readers end them; samples "
            "are separated by their records; rename the members, e.g. with _ in place of the dots",
            tar,
            f"{split[0]}.",
        )
    return found


def _record_stem(suffix: str) -> str:
    """Return the name before ``.json`` or ``.txt``; nothing for other members."""
    stem, dot, last = suffix.rpartition(".")
    return stem if dot and suffix != SKIPPED and last in (RECORD, *TEXTS) else ""


def _stem_among(stems: set[str], suffix: str) -> tuple[str, str]:
    """Split the suffix after the longest of `stems` that it begins with; ("", suffix) if it begins with none."""
    stem = suffix
    while "." in stem:
        stem = stem.rpartition(".")[0]
        if stem in stems:
            return stem, suffix[len(stem) + 1 :]
    return "", suffix


def _joined_folders(tar: Path, samples: Samples) -> Samples:
    """Join records without an image and images without a record that have the same name in different folders."""
    if not any("/" in key for key in samples):
        return samples
    records = [key for key, members in samples.items() if _lacks(is_image, members) and not _lacks(is_record, members)]
    images = [key for key, members in samples.items() if _lacks(is_record, members) and not _lacks(is_image, members)]
    for shorten in (_base, _without_last_folder, _without_first_folder):
        record_of = {shorten(key): key for key in records}
        image_of = {shorten(key): key for key in images}
        both = record_of.keys() & image_of.keys()
        if both and len(record_of) == len(records) and len(image_of) == len(images):
            partner = {image_of[name]: record_of[name] for name in both}
            partner |= {record: image for image, record in partner.items()}
            joined: Samples = {}
            for key, members in samples.items():
                if key not in partner:
                    joined[key] = members
                elif partner[key] not in joined:
                    joined[key] = members + samples[partner[key]]
            first = next(iter(both))
            log.warning(
                "%s: records and images are in different folders (%s, %s); they are joined by their names",
                *(tar, record_of[first], image_of[first]),
            )
            return joined
    return samples


def _lacks(kind: Callable[[str], bool], members: Iterable[Member]) -> bool:
    return not any(kind(member.suffix) for member in members)


def _base(key: str) -> str:
    return key.rpartition("/")[2]


def _without_last_folder(key: str) -> str:
    folder, _, base = key.rpartition("/")
    return f"{folder.rpartition('/')[0]}/{base}"


def _without_first_folder(key: str) -> str:
    return key.removeprefix("./").partition("/")[2]
