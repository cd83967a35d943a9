"""The answer to Auto classes that do not load this model."""

from __future__ import annotations

from typing import Any, NoReturn


class NoSuchAutoModel:
    """What `AutoModel` and `AutoModelForCausalLM` find instead of the model: an error that names the right class."""

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> NoReturn:
        """Raise ValueError: another Auto class loads the model."""
        raise ValueError(
            "TinyGPT-V reads images and text: load it with AutoModelForImageTextToText, not AutoModel or "
            "AutoModelForCausalLM"
        )

    _from_config = from_pretrained

    @classmethod
    def register_for_auto_class(cls, auto_class: Any) -> None:
        """Do nothing: there is nothing to save."""
