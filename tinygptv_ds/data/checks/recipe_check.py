"""All datasets of a recipe: which can train, as what mixture, and how to train on those alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygptv_ds.config.data_section import DatasetSection
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.checks.dataset_check import DatasetCheck, Scope, check_dataset
from tinygptv_ds.data.checks.mixture_shares import Plan, plan
from tinygptv_ds.data.stream.availability import options_without
from tinygptv_ds.data.stream.mixture import Mixture


@dataclass
class Check:
    """The result of checking a recipe's data.

    Attributes:
        training: the datasets that are used.
        validation: those of the panel.
        plan: the mixture of the training datasets that can train; None if there is none.
        skipped_share: samples of that mixture that are expected to drop out.
        left_out: datasets that cannot train; without them a run starts and stays within `data.max_skipped_share`.
        options: what leaves them out on a stage's command line; None if no training dataset would be left.
        complete: whether everything is there, whole, and can train.
    """

    training: list[DatasetCheck]
    validation: list[DatasetCheck]
    plan: Plan | None
    skipped_share: float
    left_out: list[str]
    options: list[str] | None
    complete: bool


def check_data(recipe: Recipe, scope: Scope) -> Check:
    """Check everything that the data section of `recipe` names.

    Raises:
        ConfigError: the weights make no mixture.
    """
    Mixture({section.name: section.weight for section in recipe.data.used})  # a mistake there shows before the work
    sections = dict.fromkeys([*recipe.data.used, *recipe.data.validation])
    found = {section: check_dataset(section, scope) for section in sections}
    training = [found[section] for section in recipe.data.used]
    unfit = {section for section, check in found.items() if not check.opens}
    unfit |= _too_broken([check for check in training if check.opens], recipe.data.max_skipped_share)
    fit = [check for check in training if check.section not in unfit]
    return Check(
        training,
        [found[section] for section in recipe.data.validation],
        plan(recipe, [check.section for check in fit]),
        _skipped_share(fit),
        [section.name for section in sections if section in unfit],
        options_without(recipe.data, unfit),
        not unfit and all(check.whole for check in found.values()),
    )


def _skipped_share(checks: Sequence[DatasetCheck]) -> float:
    """Return the share of a mixture's samples that is expected to drop out."""
    weights = sum(check.section.weight for check in checks)
    return sum(check.section.weight * check.tally.unusable_share for check in checks) / weights if checks else 0.0


def _too_broken(checks: Sequence[DatasetCheck], allowed: float) -> set[DatasetSection]:
    """Return the datasets with more than the allowed share of bad samples, if the mixture has more than that."""
    if _skipped_share(checks) <= allowed:
        return set()
    return {check.section for check in checks if check.tally.unusable_share > allowed}
