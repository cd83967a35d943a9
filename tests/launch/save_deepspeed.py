"""Stage 4 as its script has it, ending with a checkpoint in DeepSpeed's own format next to the run's model/."""

from collections.abc import Sequence
from pathlib import Path

from tinygptv_ds.train.setup.job import parse_job


def main(argv: Sequence[str] | None = None) -> None:
    job = parse_job(argv, Path(__file__).parents[2] / "stages/stage4.yaml")

    from tinygptv_ds.data.loader.sample import open_tokens
    from tinygptv_ds.data.stream.plan import open_stream
    from tinygptv_ds.dtypes import DTYPES
    from tinygptv_ds.models.parameters import lora, norms, projections, train_only
    from tinygptv_ds.train.engine import start_distributed, start_engine
    from tinygptv_ds.train.loop import train
    from tinygptv_ds.weights.assemble import build_model
    from tinygptv_ds.weights.provenance import provenance_of
    from tinygptv_ds.weights.trained import save_trained

    with start_distributed(job) as watchdog:
        model = build_model(job.recipe.model, job.recipe.text, frozen_dtype=DTYPES[job.precision])
        train_only(model, projections, norms, lora)
        stream, tokens = open_stream(job.recipe), open_tokens(job.recipe, model.config)
        with start_engine(model, job, stream, watchdog) as engine:
            train(engine, stream, tokens)
            trained = engine.trained_state()
            for name, lean in (("lean", True), ("whole", False)):
                engine.deepspeed.save_checkpoint(str(job.run_dir / name), exclude_frozen_parameters=lean)
            if job.ranks.is_main:
                save_trained(trained, model.config, job.run_dir / "model", provenance_of(job.recipe))
