"""The report of ``check-data`` as plain text for a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.checks.dataset_check import DatasetCheck
from tinygptv_ds.data.checks.mixture_shares import Plan
from tinygptv_ds.data.checks.recipe_check import Check
from tinygptv_ds.data.checks.sample_check import Tally
from tinygptv_ds.data.checks.source_check import Sources

_FOUND = (
    "shards",
    "samples",
    "bytes",
    "looked at",
    "unusable",
    "with image",
    "text only",
    "bad images",
    "longest text",
)
_SHARES = ("weight", "share", "of the cycle", "samples an epoch", "epochs in a pass", "epochs in the run")


def report(check: Check, recipe: Recipe, source: str) -> str:
    """Return the whole report; `source` is the recipe's file."""
    lines: list[str] = []
    for title, checks in (("training", check.training), ("validation", check.validation)):
        if checks:
            lines += [*_table((title, *_FOUND), [_found(found) for found in checks]), ""]
    unlike = {found.section: found for found in (*check.training, *check.validation)}
    for found in unlike.values():
        details = [*_details(found), *_narrower(found, recipe)]
        lines += [f"{found.section.name}: {found.section.shards}", *_indented(details), ""] if details else []
    lines += [*_mixture(check.plan, recipe), ""] if check.plan else []
    lines += _verdict(check, recipe, source)
    return "\n".join(lines)


def _found(found: DatasetCheck) -> tuple[str, ...]:
    """Return a row of the first tables."""
    tally = found.tally
    return (
        found.section.name,
        f"{found.found:,}" if not found.missing else f"{found.found:,} of {found.found + found.missing:,}",
        f"{found.samples:,}",
        _size(found.bytes),
        f"{tally.looked_at:,}",
        _share(sum(tally.unusable.values()), tally.looked_at),
        f"{tally.with_images:,}",
        f"{tally.text_only:,}",
        _share(tally.missing_images + tally.corrupt_images, tally.images),
        f"{tally.longest_text:,}",
    )


def _details(found: DatasetCheck) -> Iterator[str]:
    """Yield everything that is wrong with a dataset."""
    if found.problem:
        yield found.problem
    if found.missing > 1:
        more = ", ..." if found.missing > len(found.first_missing) else ""
        yield f"{found.missing:,} are missing: {', '.join(found.first_missing)}{more}"
    yield from (f"broken: {message}" for message in (*found.unreadable, *found.tally.cut_shards))
    if found.found and not found.samples:
        yield "its shards hold no sample"
    yield from _broken(found.tally)
    yield from (f"{count:,} images {note}" for note, count in sorted(found.tally.image_notes.items()))
    if found.how_to_get:
        yield from found.how_to_get.splitlines()
    if found.sources:
        yield from _sources(found.sources)


def _narrower(found: DatasetCheck, recipe: Recipe) -> Iterator[str]:
    """Yield the option that restricts a dataset to the shards that are there."""
    if found.narrowed and found.section in recipe.data.datasets:
        number = recipe.data.datasets.index(found.section)
        option = f"--set data.datasets.{number}.shards={shlex.quote(found.narrowed)}"
        yield f"to train on the {found.found:,} shard(s) that are there: {option}"


def _broken(tally: Tally) -> Iterator[str]:
    if tally.unusable:
        dropped = f"{sum(tally.unusable.values()):,} of {tally.looked_at:,} samples drop out"
        yield f"{dropped} ({_counts(tally.unusable)}), first:"
        yield from (f"  {broken.reason}: {broken.message}" for broken in tally.broken)


def _sources(sources: Sources) -> Iterator[str]:
    yield "below --root:"
    yield from (f"  {'there  ' if there else 'MISSING'} {file}" for file, there in sources.files.items())
    if sources.problem:
        yield f"  {sources.problem}"
    elif sources.entries:
        amount = f"{'all' if sources.all_entries else 'the first'} {sources.entries:,} annotation entries"
        yield f"  of {amount}, {_share(sources.missing_images, sources.entries)} lack their image"
        if sources.first_missing:
            yield f"    first: {sources.first_missing}"
        if sources.unusable:
            yield f"    unusable for other reasons: {_counts(sources.unusable)}"


def _mixture(plan: Plan, recipe: Recipe) -> Iterator[str]:
    rows = [
        (
            share.name,
            f"{share.weight:g}",
            f"{share.percent:.2f} %",
            f"{share.per_cycle:,} of {plan.cycle:,}",
            f"{share.samples:,}",
            f"{share.epochs_per_pass:.2f}",
            f"{share.epochs_of_run:.2f}",
        )
        for share in plan.shares
    ]
    yield from _table(("mixture", *_SHARES), rows)
    if recipe.data.homogeneous:
        yield "Shares are of steps: each step holds one dataset."
    yield (
        f"One pass, until every sample has been seen: {plan.steps_per_pass:,} steps of {plan.batch_size:,} samples. "
        f"The recipe trains {plan.total_steps:,}."
    )


def _verdict(check: Check, recipe: Recipe, source: str) -> Iterator[str]:
    if check.skipped_share:
        yield (
            f"About {100 * check.skipped_share:.2f} % of the samples will drop out; "
            f"data.max_skipped_share allows {100 * recipe.data.max_skipped_share:g} %."
        )
    if check.complete:
        yield f"Everything that {source} names can train."
        return
    if not check.left_out:
        yield f"Everything that {source} names can train, but not all of it is whole: see above."
        return
    yield f"{len(check.left_out)} dataset(s) that {source} names cannot train: {', '.join(check.left_out)}."
    if check.options is None:
        yield "No training dataset is left."
    else:
        yield f"To train on the others: {' '.join(check.options)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as they need to be, the first one to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for first, *others in (head, *rows):
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *cells])


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for text in lines for line in text.splitlines()]


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.2f} %)" if part else "0"


def _size(count: float) -> str:
    """Bytes in the largest unit that leaves a number above one."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
