"""The shapes of the published models, which take a second to build, are built once each."""

from collections.abc import Iterator

import pytest

from tinygptv_ds.estimate import model_size
from tinygptv_ds.models.configuration import TinyGPTVConfig


@pytest.fixture(autouse=True, scope="session")
def _shapes_once() -> Iterator[None]:
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    count = model_size.parameter_shapes

    def once(config: TinyGPTVConfig) -> dict[str, tuple[int, ...]]:
        key = config.to_json_string()
        if key not in found:
            found[key] = count(config)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_size, "parameter_shapes", once)
        yield
