"""Upper limits of a recipe's numbers: far above any use, and low enough to catch a slip of the keyboard at once."""

from __future__ import annotations

from tinygptv_ds.errors import ConfigError, shown

MOST_STEPS = 1_000_000_000


def check_limits(section: str, values: object, **largest: float) -> None:
    """Check that attributes of `values` are at most as large as given; None is not checked.

    Raises:
        ConfigError: one is larger; the message names it with `section` before it.
    """
    prefix = f"{section}." if section else ""
    for name, limit in largest.items():
        value = getattr(values, name)
        if value is not None and value > limit:
            raise ConfigError(f"{prefix}{name} must be at most {limit:,}, not {shown(value)}")
