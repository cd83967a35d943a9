"""The formula for a step's kernels gives those of the ledger, and of models of other depths."""

import pytest

from benchmarks.gpu.plan import Case
from benchmarks.operations.fusion import Kernels, compiled, uncompiled
from benchmarks.operations.step import OPTIMIZER, published_config, record_step
from benchmarks.operations.table import CASES, WAYS, name_of, read
from tinygptv_ds.models.launches import optimizer_kernels, pass_kernels, remedy

PARTS = ("projections", "norms", "lora")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_kernels_of_the_ledger(case: Case, way: str) -> None:
    parts = read()["cases"][name_of(case)][way]
    optimizer = parts[OPTIMIZER][0]
    settings = {"from_features": case.source == "features", "compiled": way == "compiled blocks", "flat": True}
    assert pass_kernels(published_config(case.stage), PARTS, **settings) == parts["all"][0] - optimizer
    # Besides it, the step's counts are summed, and its loss is scaled.
    assert optimizer < optimizer_kernels(133, flat=True) <= optimizer + 20


@pytest.mark.parametrize(("recompute", "one_rank"), [(False, False), (True, False), (True, True)])
def test_other_models(recompute: bool, one_rank: bool) -> None:
    """Few blocks, LoRA on all linear layers, blocks that run forward twice, and casts one by one or together."""
    config = published_config(4)
    config.vision_config.num_hidden_layers, config.qformer_config.num_hidden_layers = 1, 3
    config.text_config.num_hidden_layers, config.lora_targets = 2, ("query_key_value", "dense", "fc1", "fc2")
    case = Case(4, 2, "bf16", "pixels", 2, recompute=recompute)
    recorded = record_step(case, config, one_rank=one_rank).recorder.operations
    operations = [operation for operation in recorded if operation.part != OPTIMIZER]
    for count, with_compiler in ((uncompiled, False), (compiled, True)):
        if with_compiler and recompute:
            continue  # a compiler joins the recomputation with the backward pass
        found = sum(count(operations).values(), Kernels()).kernels
        settings = {"recomputed": float(recompute), "compiled": with_compiler, "flat": one_rank}
        assert pass_kernels(config, PARTS, **settings) == found


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
