"""Any opened weights under canonical names."""

from __future__ import annotations

from tinygptv_ds.weights.detect import Opened
from tinygptv_ds.weights.layouts.blip2 import canonical_name as blip2_name
from tinygptv_ds.weights.layouts.eva import canonical_name as eva_name
from tinygptv_ds.weights.layouts.original import original_source
from tinygptv_ds.weights.layouts.phi2 import to_canonical
from tinygptv_ds.weights.source import Source, rename_all


def canonical_source(opened: Opened, heads: int) -> Source:
    """All that a file holds under canonical names; what is known to be of no use is among `ignored`.

    Args:
        opened: the file.
        heads: Phi's attention heads, by which its rows are ordered when they are read; names and shapes do not depend
            on them.

    Raises:
        WeightsError: it mixes layouts.
    """
    if opened.kind == "phi":
        return to_canonical(opened.stored, heads, opened.path)
    if opened.kind == "eva_vit":
        return rename_all(opened.stored, eva_name, opened.path)
    if opened.kind == "blip2":
        return rename_all(opened.stored, blip2_name, opened.path)
    source = original_source(opened.stored, opened.path)
    return Source(opened.path, source.weights, [*source.ignored, *opened.ignored])
