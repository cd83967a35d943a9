"""The names of question templates, as recipes and command lines give them. `processing/templates.py` has the texts."""

from __future__ import annotations

from tinygptv_ds.errors import ConfigError

TRAINING = "training"  # the template that the checkpoint was trained with
BENCHMARK = "benchmark"  # the template of a benchmark's published script
ORIGINAL = ("A", "B", "C")  # the templates of the original's demos and benchmarks, see docs/use/inference.md
TEMPLATE_NAMES = (TRAINING, BENCHMARK, *ORIGINAL)
PROMPT_POOLS = ("vqa", "refer", "identify", "grounding", "detection", "caption", "stage3")  # of prompts.yaml


def check_template(template: str | None, where: str) -> None:
    """Check that questions can be put in a template.

    Args:
        template: a name of `TEMPLATE_NAMES`, a text with one `{}` for the question, or None for the default.
        where: the option or recipe key that named it, for the message.

    Raises:
        ConfigError: it is none of these.
    """
    if template is not None and template not in TEMPLATE_NAMES and template.count("{}") != 1:
        raise ConfigError(
            f"{where} must be one of {', '.join(TEMPLATE_NAMES)}, or a text with {{}} exactly once, "
            f"for the question, not {template!r}"
        )
