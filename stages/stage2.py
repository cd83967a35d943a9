"""Stage 2 of TinyGPT-V, pre-training: the same captions, now with LoRA.

Start it with `deepspeed launch/stage2.sh [options]` or `bash launch/stage2.sh [options]`; `--help` tells the options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinygptv_ds.cli import run_command
from tinygptv_ds.train.setup.job import parse_job


def main(argv: Sequence[str] | None = None) -> None:
    """Train stage 2."""
    job = parse_job(argv, Path(__file__).with_suffix(".yaml"))  # checks all that can be checked before torch is loaded

    from tinygptv_ds.data.loader.sample import open_tokens
    from tinygptv_ds.data.stream.plan import open_stream
    from tinygptv_ds.dtypes import DTYPES
    from tinygptv_ds.features.verify import check_features
    from tinygptv_ds.models.parameters import lora, norms, projections, train_only
    from tinygptv_ds.train.engine import start_distributed, start_engine
    from tinygptv_ds.train.loop import train
    from tinygptv_ds.weights.assemble import build_model
    from tinygptv_ds.weights.provenance import provenance_of
    from tinygptv_ds.weights.trained import save_trained

    with start_distributed(job) as watchdog:
        # Phi, ViT and Q-Former from their own files, then what the stage before has trained.
        model = build_model(job.recipe.model, job.recipe.text, frozen_dtype=DTYPES[job.precision])
        train_only(model, projections, norms, lora, instead=job.recipe.model.train)
        stream = open_stream(job.recipe)
        tokens = open_tokens(job.recipe, model.config)
        check_features(model, job)  # where data.features names some: stale ones are refused
        with start_engine(model, job, stream, watchdog) as engine:
            train(engine, stream, tokens)
            trained = engine.trained_state()  # gathered from all ranks
            if job.ranks.is_main:
                state = model.frozen_updates | trained
                save_trained(state, model.config, job.run_dir / "model", provenance_of(job.recipe))


if __name__ == "__main__":
    run_command(main)
