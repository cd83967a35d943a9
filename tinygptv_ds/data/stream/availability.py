"""Which datasets of a recipe have their shards here, and how to train on those that have."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection
from typing import Any

import yaml

from tinygptv_ds.config.data_section import DataSection, DatasetSection
from tinygptv_ds.errors import DataError
from tinygptv_ds.features.format import shards_of


def absent(data: DataSection) -> dict[DatasetSection, str]:
    """The datasets whose shards are not all there, each with what is missing and how to get it.

    Remote shards are only looked for where a folder or wildcard names them, and nothing is fetched.
    """
    problems = {}
    for section, root in [*((s, data.features) for s in data.used), *((s, None) for s in data.validation)]:
        try:
            shards_of(section, root, allow_pipe=section.name in data.allow_pipe)
        except DataError as error:
            from tinygptv_ds.data.sets import how_to_get  # loads numpy and the adapters of all datasets

            remedy = f"\n{how_to_get(section.name)}" if root is None else ""
            problems[section] = f"dataset {section.name}: {error}{remedy}"
    return problems


def options_without(data: DataSection, away: Collection[DatasetSection]) -> list[str] | None:
    """The options with which a stage does without the datasets in `away`, quoted for a shell.

    An empty list if it uses none of them, None if no training dataset would be left.
    """
    training = [section for section in data.used if section not in away]
    validation = [section for section in data.validation if section not in away]
    if not training:
        return None
    options = []
    if len(training) < len(data.used):
        options.append(_option("data.only", [section.name for section in training]))
    if len(validation) < len(data.validation):
        options.append(_option("data.validation", [dataclasses.asdict(section) for section in validation]))
    return options


def _option(key: str, value: list[Any]) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True, sort_keys=False)
    return f"--set {shlex.quote(f'{key}={text.strip()}')}"
