"""What the ranks of `forked` have in common, imported once in the process that they are forked from."""

import gc
import os
from importlib import import_module

# As conftest has it; this process does not see that file.
os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

gc.disable()  # while a million objects are made that stay
for name in (
    "tinygptv_ds.weights.assemble",
    "tinygptv_ds.weights.trained",
    "tinygptv_ds.weights.provenance",
    "tinygptv_ds.weights.recipe_files",
    "tinygptv_ds.data.loader.dataset",
    "tinygptv_ds.data.stream.availability",
    "tinygptv_ds.processing.resize",
    "tinygptv_ds.train.setup.preflight",
    "tinygptv_ds.train.setup.session",
    "tinygptv_ds.features.verify",
    "tinygptv_ds.train.loop",
    "tinygptv_ds.train.checkpoint.result",
    "webdataset",
    # What libraries import when a run begins, some of it for seconds.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.comm.mori",
    "setuptools",
    "distutils.ccompiler",
    "torch._subclasses.schema_check_mode",
    "torch.utils.serialization.config",
    "tensorboard.plugins.hparams.metadata",
    "encodings.idna",
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "PIL.PpmImagePlugin",
):
    import_module(name)
gc.freeze()  # the ranks share these pages until they write to them, which a collection would do
gc.enable()
