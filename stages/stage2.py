"""Stage 2 of TinyGPT-V, pre-training: the same captions, now with LoRA.

Start it with `deepspeed launch/stage2.sh [options]` or `bash launch/stage2.sh [options]`; `--help` lists the options.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinygptv_ds.cli import run_command
from tinygptv_ds.processes import without_garbage_collection
from tinygptv_ds.train.setup.job import parse_job


def main(argv: Sequence[str] | None = None) -> None:
    """Train stage 2."""
    job = parse_job(argv, Path(__file__).with_suffix(".yaml"))

    # torch is imported from here on: a mistake in recipe or options has been reported at once.
    with without_garbage_collection():
        from tinygptv_ds.data.stream.plan import open_stream
        from tinygptv_ds.features.verify import check_features
        from tinygptv_ds.models.parameters import lora, norms, projections, train_only
        from tinygptv_ds.train.checkpoint.result import save_model
        from tinygptv_ds.train.loop import train
        from tinygptv_ds.train.setup.session import open_session
        from tinygptv_ds.weights.assemble import build_model

    with open_session(job) as session:  # the ranks meet; run directory, log and watchdog
        # Phi, ViT and Q-Former from their own files, then what the stage before has trained.
        model = build_model(job.recipe.model, job.recipe.text, frozen_dtype=job.dtype)
        train_only(model, projections, norms, lora, override=job.recipe.model.train)
        stream = open_stream(job.recipe)
        check_features(model, job.recipe.data, job.precision)  # where data.features names some: stale ones are refused
        with session.start_engine(model, stream) as run:  # DeepSpeed, from the last checkpoint where there is one
            train(run, stream)
            save_model(run)


if __name__ == "__main__":
    run_command(main)
