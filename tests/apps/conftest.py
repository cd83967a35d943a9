"""The model that these tests answer with; see `helpers.loaded_model`."""

from helpers.loaded_model import exported, loaded, tiny_recipe, trained_run

__all__ = ["exported", "loaded", "tiny_recipe", "trained_run"]
