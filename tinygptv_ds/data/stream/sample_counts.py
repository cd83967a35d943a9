"""How many training samples a recipe has, as far as that is known without fetching anything. No torch."""

from __future__ import annotations

from pathlib import Path

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.stream.plan import open_stream
from tinygptv_ds.errors import DataError
from tinygptv_ds.features.format import shards_of


def local_sample_counts(recipe: Recipe) -> dict[str, int] | None:
    """Return the training samples of each dataset; None where shards are remote, missing or cannot be read."""
    data = recipe.data
    try:
        places = [shards_of(s, data.features, allow_pipe=s.name in data.allow_pipe) for s in data.used]
        if not all(isinstance(shard, Path) for shards in places for shard in shards):
            return None
        return {name: len(order) for name, order in open_stream(recipe).orders.items()}
    except DataError:
        return None
