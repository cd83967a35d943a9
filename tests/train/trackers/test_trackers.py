"""Trackers: a missing package is reported at once, a resumed run keeps its run there, and no failure reaches training.

The packages themselves run in their offline modes where they are installed, and else as stand-ins for what is called.
"""

import importlib.util
import json
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers.patience import PATIENCE
from helpers.wandb_server import serving

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.config.train_section import TRACKERS
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.train.trackers import opening
from tinygptv_ds.train.trackers.opening import check_trackers, open_trackers
from tinygptv_ds.train.trackers.tracker import TrackedRun

RAW = Callable[..., dict[str, Any]]


def test_the_package_has_to_be_there(raw_recipe: RAW, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in TRACKERS:
        recipe = build_recipe(raw_recipe(train__trackers=[name]), "test")
        with pytest.raises(
            ConfigError, match=rf"train\.trackers names {name}, .* is not installed: 'pip install {name}'"
        ):
            check_trackers(recipe)
    check_trackers(build_recipe(raw_recipe(), "test"))


def test_a_folder_of_an_earlier_run_is_no_package(
    raw_recipe: RAW, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="not installed"):
        check_trackers(build_recipe(raw_recipe(train__trackers=["wandb"]), "test"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["tensorboard"], "none of wandb, mlflow, swanlab"),
        (["mlflow", "mlflow"], "names one twice"),
        ("wandb", "a list"),
    ],
)
def test_what_a_recipe_may_name(raw_recipe: RAW, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_recipe(raw_recipe(train__trackers=value), "test")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log, which a run does not hand on to other loggers."""
    return caplog


class Recorded:
    """A tracker that records its calls and the thread that they are made in."""

    def __init__(self, run: TrackedRun) -> None:
        self.run, self.calls = run, [("start", threading.current_thread())]
        RECORDED.append(self)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append((dict(metrics), step))

    def finish(self, *, completed: bool) -> None:
        self.calls.append(("finish", completed))


RECORDED: list[Recorded] = []


@pytest.fixture
def opened(raw_recipe: RAW, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Opens trackers of a class in place of W&B's."""
    RECORDED.clear()
    recipe = build_recipe(raw_recipe(train__trackers=["wandb"]), "test")

    def start(kind: type) -> Any:
        monkeypatch.setattr(opening, "_class_of", lambda name: kind)
        return open_trackers(recipe, tmp_path)

    return start


@pytest.mark.parametrize("completed", [True, False])
def test_everything_arrives_in_order(opened: Callable[..., Any], completed: bool) -> None:
    """Later changes of the metrics that were handed over do not."""
    trackers, metrics = opened(Recorded), {"train/loss": 0.0}
    for step in range(50):
        metrics["train/loss"] = float(step)
        trackers.log(metrics, step)
    trackers.finish(completed=completed)
    (_, thread), *calls = RECORDED[0].calls
    assert calls == [*(({"train/loss": float(step)}, step) for step in range(50)), ("finish", completed)]
    assert thread is not threading.main_thread() and RECORDED[0].run.config["train"]["trackers"] == ["wandb"]


def failing(method: str, error: BaseException) -> type:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return type("Failing", (Recorded,), {method: fail})


@pytest.mark.parametrize("method", ["__init__", "log", "finish"])
def test_a_failure_is_one_warning(opened: Callable[..., Any], method: str, said: pytest.LogCaptureFixture) -> None:
    trackers = opened(failing(method, ConnectionError("no route\n to host")))
    for step in range(5):
        trackers.log({"x": 1.0}, step)
    trackers.finish(completed=True)
    assert said.text.count("wandb cannot be used (no route to host); training continues without it") == 1


def hanging(method: str, released: threading.Event) -> type:
    return type("Hanging", (Recorded,), {method: lambda *args, **kwargs: released.wait(60)})


@pytest.mark.parametrize("method", ["__init__", "log", "finish"])
def test_nothing_waits_for_long(
    opened: Callable[..., Any], method: str, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_SECONDS_TO_START", "_SECONDS_TO_SEND", "_SECONDS_AFTER_ERROR"):
        monkeypatch.setattr(opening, name, 0.2)
    released, began = threading.Event(), time.monotonic()
    trackers = opened(hanging(method, released))
    for step in range(5):
        trackers.log({"x": 1.0}, step)
    trackers.finish(completed=True)
    assert time.monotonic() - began < 20 and said.text.count("wandb") == 1
    released.set()


def test_a_tracker_that_falls_behind_is_left(
    opened: Callable[..., Any], said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_MOST_WAITING", 10)
    released = threading.Event()
    trackers = opened(hanging("log", released))
    for step in range(100):
        trackers.log({"x": 1.0}, step)
    released.set()
    trackers.finish(completed=True)
    assert said.text.count("it is 10 lines behind") == 1


class StandIn:
    """What the three packages are called with; used where they are not installed."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []

    def module(self, name: str) -> ModuleType:
        made = ModuleType(name)
        made.__spec__ = importlib.util.spec_from_loader(name, loader=None, origin="stand-in")
        getattr(self, f"_{name}")(made)
        return made

    def _started(self, **settings: Any) -> dict[str, Any]:
        self.runs.append({"settings": settings, "rows": [], "end": None})
        return self.runs[-1]

    def _wandb(self, made: Any) -> None:
        def init(*, project: str, name: str, dir: str, id: str, resume: str, config: dict, settings: Any) -> Any:
            run = self._started(project=project, name=name, id=id, config=config)

            def log(data: dict[str, float]) -> None:
                run["rows"].append((data["step"], {key: value for key, value in data.items() if key != "step"}))

            def define_metric(name: str, step_metric: str | None = None) -> None:
                run["settings"][name] = step_metric

            return SimpleNamespace(
                log=log, define_metric=define_metric, finish=lambda exit_code: run.update(end=exit_code)
            )

        made.init, made.Settings = init, lambda **settings: settings

    def _swanlab(self, made: Any) -> None:
        def init(*, project: str, name: str, log_dir: str, id: str, resume: str, config: dict, settings: Any) -> Any:
            run = self._started(project=project, name=name, id=id, config=config)
            return SimpleNamespace(
                log=lambda data, step: run["rows"].append((step, data)),
                finish=lambda state="success", error=None: run.update(end=state),
            )

        made.init = init
        made.Settings = lambda **settings: settings
        made.Settings.Terminal = lambda **settings: settings


METRICS = {"train/loss": 0.5, "data/mix_digits_vqa": 50.0, "train/odd": float("nan")}


@pytest.fixture
def attempts(raw_recipe: RAW, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A run that is interrupted after step 5, and resumed from step 3 to step 8."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "SWANLAB_MODE": "local"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # W&B puts its own in front
    monkeypatch.chdir(tmp_path)

    def train(name: str) -> Path:
        recipe = build_recipe(raw_recipe(train__trackers=[name], train__tracker_project="cats"), "test")
        folder = tmp_path / "mine"
        folder.mkdir()
        handler = signal.getsignal(signal.SIGINT)
        for steps, completed in ((range(1, 6), False), (range(4, 9), True)):
            trackers = open_trackers(recipe, folder)
            for step in steps:
                trackers.log({**METRICS, "train/loss": 1 / step}, step)
            trackers.finish(completed=completed)
        assert signal.getsignal(signal.SIGINT) is handler  # it saves the run
        assert list(json.loads((folder / "trackers.json").read_text())) == [name]
        return folder

    return train


STEPS = [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_what_the_packages_are_called_with(
    name: str, attempts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is lost that a resumed run repeats, and the second attempt has the id of the first."""
    stand_in, ours = StandIn(), f"tinygptv_ds.train.trackers.{name}"
    monkeypatch.setitem(sys.modules, name, stand_in.module(name))
    sys.modules.pop(ours, None)
    try:
        attempts(name)
    finally:
        sys.modules.pop(ours)  # it has the stand-in
    first, second = stand_in.runs
    assert [step for step, _ in first["rows"] + second["rows"]] == STEPS
    assert first["rows"][0][1].keys() == METRICS.keys()
    assert first["settings"] == second["settings"] and first["settings"]["project"] == "cats"
    assert first["settings"]["name"] == "mine" and first["settings"]["config"]["train"]["batch_size"]
    assert (first["end"], second["end"]) == ((1, 0) if name == "wandb" else ("aborted", "success"))
    if name == "wandb":  # its own steps may not descend: the metrics have an axis of theirs
        assert first["settings"]["*"] == "step"


def test_wandb_itself(attempts: Callable[[str], Path]) -> None:
    pytest.importorskip("wandb")
    folder = attempts("wandb")
    (chosen,) = json.loads((folder / "trackers.json").read_text()).values()
    attempted = sorted(folder.glob("wandb/offline-run-*"))  # the name of a second one in the same second ends with -1
    runs = [list(wandb_records(file)) for each in attempted for file in each.glob("run-*.wandb")]
    assert {record.run.run_id for run in runs for record in run if record.HasField("run")} == {chosen}
    rows = [record.history for run in runs for record in run if record.HasField("history")]
    values = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in rows]
    assert [row["step"] for row in values] == STEPS and [row["train/loss"] for row in values] == [1 / s for s in STEPS]


def test_wandb_sync_appends_what_a_resumed_run_repeats(
    attempts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows follow each other, over W&B's own ascending steps, also if each attempt is sent by itself."""
    pytest.importorskip("wandb", minversion="0.31")
    folder = attempts("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("WANDB_MODE")
    files = sorted(folder.glob("wandb/offline-run-*"))
    with serving() as (url, rows):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        for file in files:
            command = [sys.executable, "-m", "wandb", "sync", str(file)]
            done = subprocess.run(command, timeout=PATIENCE, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    (found,) = rows.values()
    assert [found[at]["step"] for at in range(len(found))] == STEPS
    assert [found[at]["_step"] for at in range(len(found))] == list(range(len(STEPS)))


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a file of W&B: a log in blocks of 32 KiB, as LevelDB's, after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(parts)
            parts = b""


def test_mlflow_itself(attempts: Callable[[str], Path]) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    folder = attempts("mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("cats").experiment_id])
    assert json.loads((folder / "trackers.json").read_text()) == {"mlflow": run.info.run_id}
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED") and run.data.params[
        "train.tracker_project"
    ] == "cats"
    assert [each.step for each in client.get_metric_history(run.info.run_id, "train/loss")] == STEPS
    client.delete_run(run.info.run_id)


def test_swanlab_itself(attempts: Callable[[str], Path]) -> None:
    pytest.importorskip("swanlab")
    folder = attempts("swanlab")
    logs = sorted(folder.glob("swanlog/run-*/logs/*/*.log"))
    rows = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    losses = [
        (row["index"], row["data"]) for row in rows if row["data"] not in (50.0, "NaN") and row["data"] == row["data"]
    ]
    assert sorted(losses) == sorted((step, 1 / step) for step in STEPS)
