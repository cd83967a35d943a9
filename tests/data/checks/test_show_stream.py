"""The command `stream`: the same lines for any ranks and workers, each rank's share, no torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tinygptv_ds.cli import main

RECIPE = Callable[..., Path]


def stream(recipe: Path, capsys: pytest.CaptureFixture, *options: object) -> list[dict]:
    main(["stream", str(recipe), *map(str, options)])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("change", [{}, {"train__micro_batch_size": None, "train__max_tokens": 120}])
def test_ranks_and_workers_change_nothing(change: dict, recipe_file: RECIPE, capsys: pytest.CaptureFixture) -> None:
    recipe = recipe_file(**change)
    alone = stream(recipe, capsys, "--steps", 5)
    assert [line["position"] for line in alone] == list(range(40))
    assert [line["step"] for line in alone] == [position // 8 for position in range(40)]
    assert alone[0].keys() == {"step", "position", "dataset", "shard", "index"}
    assert all(Path(line["shard"]).is_file() for line in alone)
    for world in (2, 3, 4, 8):
        assert stream(recipe, capsys, "--steps", 5, "--world-size", world) == alone
    assert stream(recipe, capsys, "--steps", 5, "--world-size", 2, "--workers", 2) == alone
    assert stream(recipe, capsys, "--steps", 2, "--start-step", 3, "--world-size", 4) == alone[24:]


def test_rank_shares_make_up_the_whole(recipe_file: RECIPE, capsys: pytest.CaptureFixture) -> None:
    recipe = recipe_file()
    whole = stream(recipe, capsys, "--steps", 4)
    shares = [stream(recipe, capsys, "--steps", 4, "--world-size", 4, "--rank", rank) for rank in range(4)]
    assert {len(share) for share in shares} == {8}
    assert sorted((line for share in shares for line in share), key=lambda line: line["position"]) == whole


def test_held_out_samples_are_never_trained_on(recipe_file: RECIPE, capsys: pytest.CaptureFixture) -> None:
    recipe = recipe_file(data__validation_share=0.25)

    def seen(*options: object) -> set[tuple]:
        lines = stream(recipe, capsys, "--steps", 30, *options)
        return {(line["dataset"], line["shard"], line["index"]) for line in lines}

    trained, held_out = seen(), seen("--held-out")
    assert not trained & held_out
    assert len(held_out) == 0.25 * 48
    assert len(trained | held_out) == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "2", "--world-size", "2"], "ranks go to 1"),
        (["--world-size", "0"], "--world-size must be at least 1"),
        (["--rank", "0", "--world-size", "3"], "does not divide into micro-batches of 2 on 3 rank"),
        (["--held-out"], "nothing is held out"),
        (["--set", "data.datasets.0.shards=none/*.tar"], "not found: none/"),
    ],
)
def test_mistakes(options: list[str], message: str, recipe_file: RECIPE) -> None:
    command = [sys.executable, "-m", "tinygptv_ds", "stream", str(recipe_file()), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr


def test_needs_no_torch_and_stands_a_closed_pipe(recipe_file: RECIPE) -> None:
    script = (
        "import sys\nfrom tinygptv_ds.cli import main\n"
        f"main(['stream', {str(recipe_file())!r}, '--steps', '2'])\nassert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
    piped = f"{sys.executable} -m tinygptv_ds stream {recipe_file()} --steps 3000 | head -1"
    done = subprocess.run(piped, shell=True, capture_output=True, text=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
