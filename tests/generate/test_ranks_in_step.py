"""Ranks that gather weights together run the same number of forward passes, whatever their answers are."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import tiny
from helpers.forked import fork_context
from helpers.patience import PATIENCE

from tinygptv_ds.generate.conversation import Conversation
from tinygptv_ds.generate.generate import answers
from tinygptv_ds.generate.load import load_model
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.processing.templates import training_template

SETTINGS = [Generation(max_new_tokens=9), Generation(max_new_tokens=9, num_beams=2)]


def answer(rank: int, model_folder: Path, folder: Path) -> None:
    """Answer as one of two ranks: three questions with images, or one without that ends at its first token."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, processor = load_model(model_folder, torch.float32)
    model.always_run_vision = True
    passes = {"language": 0, "vision": 0}

    def count(name: str) -> None:
        passes[name] += 1

    model.language_model.model.register_forward_hook(lambda *_: count("language"))
    model.visual_encoder.patch_embed.register_forward_hook(lambda *_: count("vision"))
    talk = training_template("[INST] {} [/INST]", "###")
    asked = [[("what is it ?", [image]) for image in tiny.encoded_images(3)], [("the bus", [])]][rank]
    prompts = [Conversation(talk).ask(*question) for question in asked]
    found = []
    for settings in SETTINGS:
        alone = list(answers(model, processor, prompts, settings))
        stop = tuple(alone[0][:1]) if rank else ()
        expected = list(answers(model, processor, prompts, Generation(**vars(settings) | {"stop": stop})))
        passes |= {"language": 0, "vision": 0}
        together = list(answers(model, processor, prompts, Generation(**vars(settings) | {"stop": stop}), in_step=True))
        found.append({"passes": dict(passes), "equal": together == expected})
    dist.barrier()
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_the_same_passes(exported: Path, tmp_path: Path) -> None:
    ranks = [fork_context().Process(target=answer, args=(rank, exported, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PATIENCE)
        assert process.exitcode == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert all(each["equal"] and each["passes"]["vision"] == 1 and each["passes"]["language"] == 9 for each in first)
