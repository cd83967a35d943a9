"""Stage 4 as its script has it, ending with a checkpoint in DeepSpeed's own format next to the run's model/."""

from collections.abc import Sequence
from pathlib import Path

from tinygptv_ds.train.setup.job import parse_job


def main(argv: Sequence[str] | None = None) -> None:
    job = parse_job(argv, Path(__file__).parents[2] / "stages/stage4.yaml")

    from tinygptv_ds.data.stream.plan import open_stream
    from tinygptv_ds.models.parameters import lora, norms, projections, train_only
    from tinygptv_ds.train.checkpoint.result import save_model
    from tinygptv_ds.train.loop import train
    from tinygptv_ds.train.setup.session import open_session
    from tinygptv_ds.weights.assemble import build_model

    with open_session(job) as session:
        model = build_model(job.recipe.model, job.recipe.text, frozen_dtype=job.dtype)
        train_only(model, projections, norms, lora)
        stream = open_stream(job.recipe)
        with session.start_engine(model, stream) as run:
            train(run, stream)
            for name, lean in (("lean", True), ("whole", False)):
                run.engine.deepspeed.save_checkpoint(str(job.run_dir / name), exclude_frozen_parameters=lean)
            save_model(run)
