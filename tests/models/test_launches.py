"""The formula for a step's kernels gives those of the ledger, and of models of other depths."""

import pytest

from benchmarks.gpu.plan import Case
from benchmarks.operations.fusion import Kernels, compiled, uncompiled
from benchmarks.operations.step import published_config, record_step
from benchmarks.operations.table import CASES, WAYS, name_of, read
from tinygptv_ds.models.launches import optimizer_kernels, pass_kernels, remedy

PARTS = ("projections", "norms", "lora")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_kernels_of_the_ledger(case: Case, way: str) -> None:
    kernels = read()["cases"][name_of(case)][way]["all"][0]
    config = published_config(case.stage)
    features = case.source == "features"
    assert pass_kernels(config, PARTS, from_features=features, compiled=way == "compiled blocks") == kernels


@pytest.mark.parametrize("recompute", [False, True])
def test_other_models(recompute: bool) -> None:
    """Few blocks, LoRA on all linear layers, and blocks that run forward twice."""
    config = published_config(4)
    config.vision_config.num_hidden_layers, config.qformer_config.num_hidden_layers = 1, 3
    config.text_config.num_hidden_layers, config.lora_targets = 2, ("query_key_value", "dense", "fc1", "fc2")
    operations = record_step(Case(4, 2, "bf16", "pixels", 2, recompute=recompute), config).recorder.operations
    for count, with_compiler in ((uncompiled, False), (compiled, True)):
        if with_compiler and recompute:
            continue  # a compiler joins the recomputation with the backward pass
        found = sum(count(operations).values(), Kernels()).kernels
        assert pass_kernels(config, PARTS, recomputed=float(recompute), compiled=with_compiler) == found


def test_what_is_trained_launches_more() -> None:
    config = published_config(4)
    frozen, qformer, vit = (pass_kernels(config, parts) for parts in (PARTS, (*PARTS, "qformer"), (*PARTS, "vit")))
    assert frozen < qformer < vit
    assert optimizer_kernels(261, flat=False) > optimizer_kernels(261, flat=True)


def test_remedies_are_what_is_left_to_do() -> None:
    done = {"from_features": True, "compiled": True, "graphs": True}
    keys = {"from_features": "data.features", "compiled": "model.compile", "graphs": "train.cuda_graph_tokens"}
    assert remedy(**done) == "a larger micro-batch (train.micro_batch_size)"
    for name, key in keys.items():
        assert remedy(**done | {name: False}).endswith(f"({key})")
