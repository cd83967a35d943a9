"""The verb `report`: one HTML page about a run, or one that compares several."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from tinygptv_ds import __version__
from tinygptv_ds.apps.report.run_data import find_runs, read_runs
from tinygptv_ds.charts.style import THEMES, standalone
from tinygptv_ds.config.paths import check_ending
from tinygptv_ds.files import whole_file

_CURVE_SIZE = (720.0, 300.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run directory, or a folder that holds several"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page, one self-contained HTML file (default: %(default)s)",
    )
    parser.add_argument(
        "--loss-curve",
        type=Path,
        metavar="FILE.svg",
        help="write the training loss as a chart of its own, too: FILE-light.svg and FILE-dark.svg",
    )


def run(args: argparse.Namespace) -> None:
    """Write the report.

    Raises:
        ConfigError: a path is no run, or an output has another ending than that of its format.
    """
    check_ending("--out", args.out, ".html")
    check_ending("--loss-curve", args.loss_curve, ".svg")
    for file in write_report(args.runs, args.out, args.loss_curve):
        print(file)


def write_report(paths: Sequence[Path], out: Path, loss_curve: Path | None = None) -> list[Path]:
    """Write the page about the runs at `paths`, and the loss curve where it is asked for; return the files.

    Raises:
        ConfigError: a path is no run.
    """
    from tinygptv_ds.apps.report.curves import loss_curve as draw_loss_curve
    from tinygptv_ds.apps.report.page import page

    runs = read_runs(find_runs(paths))
    made = f"Made by tinygptv_ds {__version__} on {time.strftime('%Y-%m-%d at %H:%M UTC', time.gmtime())}."
    files = {out: page(runs, made)}
    if loss_curve is not None:
        chart = draw_loss_curve(runs, _CURVE_SIZE)
        files |= {loss_curve.with_stem(f"{loss_curve.stem}-{theme}"): standalone(chart, theme) for theme in THEMES}
    for file, text in files.items():
        with whole_file(file) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return list(files)
