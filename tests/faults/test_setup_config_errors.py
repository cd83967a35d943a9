"""Mistakes in recipe, JSON or options are reported with key and remedy before anything large is imported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
AUTO = '{"gradient_clipping": 0.0, "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}'
BATCH = '{"gradient_clipping": 0.0, "zero_optimization": {"stage": 2}, "train_batch_size": 48}'
TWICE = '{"gradient_clipping": 0.0, "gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}'
DEEP = '{"a": ' * 5000
# Options (a text in braces is a JSON file), and what the message holds: the key, and what to do.
MISTAKES = [
    (["--set", "train.batchsize=4"], ["unknown key train.batchsize", "did you mean batch_size?"]),
    (["--set", "optimiser.lr=1"], ["unknown key optimiser", "did you mean optimizer?"]),
    (["--set", "train.batch_size=many"], ["train.batch_size must be a whole number, not 'many'"]),
    (["--set", "model.train=[q_former]"], ["model.train: 'q_former'", "did you mean qformer?"]),
    (["--set", "optimizer.schedule=cos"], ["optimizer.schedule: 'cos' is unknown", "did you mean cosine?"]),
    (["--set", "train.micro_batch_size=3"], ["train.batch_size 2 does not divide", "choose train.micro_batch_size in"]),
    (["--set", "deepspeed.zero_optimization.stage=5"], ["zero_optimization.stage is 5; use 1, 2 or 3"]),
    (["--set", "deepspeed.gradient_cliping=1"], ["unknown key 'gradient_cliping'", "did you mean gradient_clipping?"]),
    (["--deepspeed_config", BATCH], ["train_batch_size is 48", "make it 2", "Leave the key out of the JSON"]),
    (["--deepspeed_config", AUTO], ['zero_optimization.reduce_bucket_size is "auto"', "write a value"]),
    (["--deepspeed_config", DEEP], ["nested too deeply for a DeepSpeed JSON"]),
    (["--deepspeed_config", TWICE], ["gradient_clipping is given twice"]),
    (["--deepspeed_config", "ds_configs/zeropp.json"], ["zero_hpz_partition_size is 8", "--set deepspeed.zero_opt"]),
    (["--deepspeed_config", "ds_configs/zero9.json"], ["no DeepSpeed JSON at", "ds_configs/ holds the ready ones"]),
]
# Found last: the options are right, but neither weights nor shards are there.
MISSING = [
    "model.phi: weights/phi-2 does not exist. Phi-2: 'hf download",
    "dataset gqa: shards 'data/gqa/*.tar': not found",
    "ROOT/gqa/train_balanced_questions.json",
]
MODULES = 40  # of this package, until a mistake in options, recipe or JSON is found; nearly all of them in config/
# One process for all of them: starting Python takes longer than the checks.
ASK = """
import json, sys, time
from pathlib import Path
sys.modules.update(dict.fromkeys(("torch", "deepspeed", "transformers", "numpy")))
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.train.setup.job import parse_job
reports, ours = [], []
for options in json.loads(sys.argv[1]):
    start = time.process_time()  # other processes on the machine do not count
    try:
        parse_job(options, Path("stages/stage4.yaml"))
    except ConfigError as error:
        reports.append([str(error), time.process_time() - start])
    ours.append(sum(name.startswith("tinygptv_ds") for name in sys.modules))
print(json.dumps([reports, ours]))
"""


def test_each_is_reported_at_once(tmp_path: Path) -> None:
    asked = [
        [_file(tmp_path / f"{number}.json", text) for text in options] for number, (options, _) in enumerate(MISTAKES)
    ]
    asked.append(["--deepspeed-config", "ds_configs/cpu.json", "--run-dir", str(tmp_path / "run")])
    command = [sys.executable, "-c", ASK, json.dumps(asked)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reports, ours = json.loads(done.stdout)
    assert len(reports) == len(asked)
    assert ours[len(MISTAKES) - 1] <= MODULES < ours[-1]
    for (message, seconds), (options, parts) in zip(reports, [*MISTAKES, (asked[-1], MISSING)], strict=True):
        assert all(part in message for part in parts), (options, message)
        assert seconds < 1


def test_the_launcher_is_not_started(tmp_path: Path) -> None:
    """It would import torch, and print a dozen lines around the one that matters."""
    command = ["bash", "launch/stage1.sh", "--num_gpus", "1", "--set", "data.nonsense=1", "--run-dir", str(tmp_path)]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.fullmatch(r"error: stages/stage1.yaml: unknown key data.nonsense; .*\n", done.stderr)


def _file(path: Path, text: str) -> str:
    """Return an option, or the path of a file that holds it where it is a JSON object."""
    if text.startswith("{"):
        path.write_text(text)
        return str(path)
    return text
