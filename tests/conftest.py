"""What all tests share: `--golden DIR`, a tiny model's weights and shards, and no GPU, no network, no hub."""

import gc
import logging
import os
import signal
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# The tests hold on a CPU alone; they and the processes that they start see nothing else.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

# A shell ignores SIGINT for what it starts in the background, nohup SIGHUP; every process would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# An example that takes long on a busy machine is no failure, nor is making it.
slow = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=slow)
hypothesis.settings.load_profile("any machine")

gc.disable()  # until all tests are collected: a million objects are made, and nearly all of them stay

KINDS = ("vqa", "text", "chat", "pair")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def pytest_addoption(parser: pytest.Parser) -> None:
    # pytest tests/golden --golden DIR; without a folder of tests before it, pytest takes a DIR apart from its option
    # for one: --golden=DIR then.
    parser.addoption("--golden", metavar="DIR", help="folder with the reference data (default: tests/golden/data)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where xdist hands out files: those with many tests first, and those that start ranks in between.

    The last ones are then short, whichever worker takes them, and not all ranks run at the same time.
    """
    if not hasattr(config, "workerinput"):
        return
    counts = Counter(item.path for item in items)
    by_count = sorted(counts, key=counts.__getitem__, reverse=True)
    with_ranks = [path for path in by_count if path.parent.name in ("launch", "faults")]
    others = [path for path in by_count if path not in with_ranks]
    place = {path: number / len(group) for group in (with_ranks, others) for number, path in enumerate(group)}
    place |= {path: 0.6 * place[path] for path in with_ranks}
    items.sort(key=lambda item: place[item.path])


def pytest_collection_finish() -> None:
    """Take modules and tests, which are there to the end, out of the sight of every later collection of garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to another machine is an error at once, not a test that passes here and fails elsewhere."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            raise RuntimeError(f"a test wants to connect to {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def package_logger() -> None:
    """What a test logs reaches `caplog`, whatever an earlier one has set up."""
    logger = logging.getLogger("tinygptv_ds")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's weights in the released files' layouts."""
    from helpers import tiny

    return tiny.save_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small dataset of each kind: one image, none, a conversation, two images."""
    from helpers import tiny

    folder = tmp_path_factory.mktemp("shards")
    return {kind: tiny.write_shards(folder / kind, tiny.samples(kind, 12)) for kind in KINDS}


@pytest.fixture
def raw_recipe(weights: Path, shards: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """Makes a recipe as plain values; `changes` are dotted keys with `__` for the dot."""
    from helpers import tiny

    return lambda **changes: tiny.recipe(weights, shards, **changes)


@pytest.fixture
def recipe_file(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Writes that recipe as a YAML file."""
    from helpers import tiny

    return lambda **changes: tiny.write_recipe(tmp_path / "recipe.yaml", raw_recipe(**changes))
