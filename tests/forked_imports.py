"""What the ranks of `forked` have in common, imported once in the process that they are forked from."""

import os

# As conftest has it; this process does not see that file.
os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")


import tinygptv_ds.convert.assemble
import tinygptv_ds.convert.model_folder
import tinygptv_ds.convert.provenance
import tinygptv_ds.data.loader
import tinygptv_ds.data.pictures
import tinygptv_ds.models.lora
import tinygptv_ds.processing.resize
import tinygptv_ds.train.engine
import tinygptv_ds.train.loop
import tinygptv_ds.train.resume
import tinygptv_ds.train.saver  # noqa: F401
