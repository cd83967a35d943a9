"""The checks of a training job before anything is loaded: its files exist, and its benchmarks can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import ConfigError, DataError, ObjectStorageError
from tinygptv_ds.object_storage import RemoteFolders
from tinygptv_ds.weights.recipe_files import check_files

if TYPE_CHECKING:
    from tinygptv_ds.evaluation.benchmarks.question import Task


def check_mirror(recipe: Recipe) -> None:
    """Check that the mirror can be written to, with one small object.

    Raises:
        ConfigError: it cannot; names the URL and the remedy.
    """
    if recipe.train.mirror is None:
        return
    try:
        RemoteFolders(recipe.train.mirror).check_writable()
    except ObjectStorageError as error:
        raise ConfigError(f"train.mirror: {error}") from None


def check_and_open_benchmarks(recipe: Recipe) -> list[Task]:
    """Check that every file that a recipe names exists, and return the benchmarks that it scores while training.

    Raises:
        ConfigError: lists every missing weight file and dataset and what is wrong with benchmarks, each with its
            remedy.
    """
    tasks, problems = [], []
    if recipe.evaluation.benchmarks:
        try:
            tasks = _evaluation_tasks(recipe)
        except (ConfigError, DataError) as error:
            problems.append(f"evaluation: {error}")
    check_files(recipe, problems)
    return tasks


def _evaluation_tasks(recipe: Recipe) -> list[Task]:
    """Return the benchmarks that the recipe scores while training, with their questions.

    Raises:
        DataError: benchmark files or held-out shards are missing or invalid; all of them are named.
        ConfigError: a package that a score needs is not installed.
    """
    # Imported here because the readers of benchmarks load numpy, and most recipes name no benchmark.
    from tinygptv_ds.evaluation.benchmarks.file_checks import Checks
    from tinygptv_ds.evaluation.benchmarks.table import open_section

    checks, section = Checks(), recipe.evaluation
    tasks = []
    for benchmark in section.benchmarks:
        try:
            tasks.append(open_section(benchmark, section.limit, checks))
        except DataError as error:
            checks.problem(f"{benchmark.label}: {error}")
    checks.finish()
    _check_keep_best(recipe, tasks)
    return tasks


def _check_keep_best(recipe: Recipe, tasks: list[Task]) -> None:
    """Check that the benchmark of `train.keep_best` has the score that it names."""
    _, _, rest = (recipe.train.keep_best or "").partition("eval/")
    name, _, wanted = rest.rpartition("/")
    for task in tasks:
        scores = [*task.benchmark.rules, *task.benchmark.corpus_names]
        if task.name == name and wanted not in scores:
            raise ConfigError(f"train.keep_best: {name} has no score {wanted!r}; choose one of {', '.join(scores)}")
