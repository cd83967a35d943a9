"""Results of an evaluation as files, as a Markdown table next to published numbers, and as scalars on TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinygptv_ds.board_tags import board_tag
from tinygptv_ds.files import whole_file

NamedScores = tuple[str, Mapping[str, float]]  # the name of a model, and its scores by benchmark


def save_json(path: Path, result: Any) -> None:
    """Write `result`; the file is complete or not there."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def line_of(result: Mapping[str, Any]) -> str:
    """Return the scores of one result as a line for the console."""
    scores = ", ".join(
        f"{name} {value:.3f}" if name == "iou" else f"{name} {value:.2f}" for name, value in _scores(result).items()
    )
    return (
        f"{result['benchmark']}: {scores} of {result['questions']} questions "
        f"({result['empty_answers']} empty, {result['unparsable_answers']} unparsable answers)"
    )


def markdown(results: Sequence[Mapping[str, Any]], published: Mapping[str, Any]) -> str:
    """Return a page with the strict and compat scores of results next to the published ones, then all counts.

    Args:
        results: results of one model.
        published: `rows`, a list of {model, scores by benchmark}, and `note`, how reliable they are.
    """
    names = [result["benchmark"] for result in results]
    page = [f"# {results[0]['model']}", f"Checkpoint `{results[0]['checkpoint']}`, step {results[0]['step']}."]
    known = {name for row in published["rows"] for name in row["scores"]}
    compared = [name for name in names if name in known]
    if compared:
        rows: list[NamedScores] = []
        for row in published["rows"]:
            scores = {name: row["scores"][name] for name in compared if name in row["scores"]}
            if scores:
                rows.append((row["model"], scores))
        for rule in ("strict", "compat"):
            ours = {result["benchmark"]: result[rule] for result in results if rule in result}
            rows.append((f"**this model, {rule}**", ours))
        page += [_table(compared, rows), f"Published numbers: {published['note'].strip()}"]
    header = ("benchmark", "questions", "scores", "empty", "unparsable", "asked with")
    page.append(_lines(header, [_counts(result) for result in results]))
    return "\n\n".join(page) + "\n"


def write_scalars(folder: Path, values: Mapping[str, float], step: int) -> None:
    """Add metrics to a TensorBoard folder under their tags, in an event file of their own."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder, filename_suffix=".eval") as board:
        for name, value in values.items():
            board.add_scalar(board_tag(name), value, step)


def _table(names: Sequence[str], rows: Sequence[NamedScores]) -> str:
    """Return a table with a column for each benchmark, and the mean of those that a row has."""
    lines = []
    for model, scores in rows:
        given = [scores[name] for name in names if name in scores]
        cells = [f"{scores[name]:.1f}" if name in scores else "-" for name in names]
        lines.append((model, *cells, f"{sum(given) / len(given):.1f}" if given else "-"))
    return _lines(("model", *names, "mean of given"), lines)


def _counts(result: Mapping[str, Any]) -> tuple[str, ...]:
    scores = ", ".join(f"{name} {value:.2f}" for name, value in _scores(result).items())
    template, wording = result["template"], result.get("wording")
    if wording and len(wording) == 1:
        template = (template or "{}").replace("{}", wording[0], 1)
    template = f"`{template!r}`"
    numbers = [str(result[key]) for key in ("questions", "empty_answers", "unparsable_answers")]
    return result["benchmark"], numbers[0], scores, numbers[1], numbers[2], template.replace("|", "\\|")


def _scores(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of a result; its counts are integers."""
    return {name: value for name, value in result.items() if isinstance(value, float)}


def _lines(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
