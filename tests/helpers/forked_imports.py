"""What the ranks of `forked` have in common, imported once in the process that they are forked from."""

import os
from importlib import import_module

# As conftest has it; this process does not see that file.
os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

for name in (
    "tinygptv_ds.weights.assemble",
    "tinygptv_ds.weights.trained",
    "tinygptv_ds.weights.provenance",
    "tinygptv_ds.data.loader.dataset",
    "tinygptv_ds.processing.resize",
    "tinygptv_ds.train.setup.session",
    "tinygptv_ds.features.verify",
    "tinygptv_ds.train.loop",
    "tinygptv_ds.train.checkpoint.result",
    "webdataset",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed imports it when an engine is made; it takes seconds
):
    import_module(name)
