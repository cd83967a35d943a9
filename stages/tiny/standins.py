"""Small stand-ins for the pretrained parts, made in minutes on two CPU cores, in the layouts of the released files.

A real run starts from EVA-CLIP's ViT, BLIP-2's Q-Former and Phi-2. The quick start has no such files, so this script
trains tiny ones of the same structure on digit scenes, each separately: ViT and Q-Former learn to read a scene
(pretrain_vision.py), Phi learns to answer from a list of what is in it (pretrain_text.py). What is left to the stages
is what TinyGPT-V's stages do: to carry what the queries say into Phi's embedding space, and to adapt Phi to it.

    python stages/tiny/standins.py --out DIR

`pretrained/` holds what it makes, for the quick start to begin with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from transformers import PhiConfig, PhiForCausalLM

from stages.tiny import pretrain_text, pretrain_vision
from tinygptv_ds.cli import run_command
from tinygptv_ds.data.process_pool import WorkerPool
from tinygptv_ds.files import whole_file, whole_folder
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights.io import in_memory
from tinygptv_ds.weights.layouts.blip2 import original_name
from tinygptv_ds.weights.layouts.phi2 import ADDED_NORMS, to_layout

PHI, EVA_VIT, QFORMER = "phi", "eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth"
MANIFEST = "standins.json"


def make_standins(out: Path, *, seed: int, steps: int | None = None) -> dict:
    """Make `out/phi/`, `out/eva_vit_g.pth` and `out/blip2_pretrained_flant5xxl.pth`, unless they are there.

    The two trainings run side by side, one thread each: the models are too small to gain from more.

    Args:
        out: folder, made if need be.
        seed: of everything random.
        steps: of both trainings, to try things out; None: as many as they need.

    Returns:
        The manifest: settings, and how well each part does on held-out scenes ("digits_read", 0-1; "text_loss").
    """
    settings = _settings(seed, steps)
    manifest = out / MANIFEST
    if manifest.exists() and all((out / name).exists() for name in (PHI, EVA_VIT, QFORMER)):
        made = json.loads(manifest.read_text())
        if made["settings"] == settings:
            print(f"{out}: stand-ins are complete, reused")
            return made
    out.mkdir(parents=True, exist_ok=True)
    manifest.unlink(missing_ok=True)
    with WorkerPool(2, remedy="close other programs and run it again") as pool:
        vision, text = pool.submit(make_vision, out, seed, steps), pool.submit(make_phi, out, seed, steps)
        made = {"settings": settings, "digits_read": vision.result(), "text_loss": text.result()}
    with whole_file(manifest) as partial:
        partial.write_text(json.dumps(made, indent=2) + "\n")
    return made


def _settings(seed: int, steps: int | None) -> dict:
    """Return everything that the weights depend on."""
    here = Path(__file__).parent
    sources = [here / name for name in ("standins.py", "pretrain.py", "pretrain_text.py", "pretrain_vision.py")]
    sources.append(Path(pretrain_text.digits.__file__))
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    trainings = {"vision": asdict(pretrain_vision.TRAINING), "text": asdict(pretrain_text.TRAINING)}
    return {"seed": seed, "steps": steps, **trainings, "code": code}


def _model(seed: int, end: int) -> TinyGPTVForConditionalGeneration:
    """The tiny model, of which only the pretrained parts are used; `end` begins, ends and pads texts."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    config = TinyGPTVConfig(
        vision_config=pretrain_vision.EVA_VIT,
        qformer_config=pretrain_vision.QFORMER,
        text_config=pretrain_text.PHI | special,
        num_query_tokens=pretrain_vision.CELLS,
        proj_hidden_size=pretrain_text.PHI["hidden_size"],
    )
    return TinyGPTVForConditionalGeneration(config)


def make_vision(out: Path, seed: int, steps: int | None) -> float:
    """Train and write ViT and Q-Former; return the share of held-out digits that are read right."""
    training = pretrain_vision.TRAINING
    model = _model(seed, end=0)
    read = pretrain_vision.train_vision(model, training if steps is None else replace(training, steps=steps), seed)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    _save(eva_layout(weights), out / EVA_VIT)
    _save({"model": blip2_layout(weights)}, out / QFORMER)
    return read


def make_phi(out: Path, seed: int, steps: int | None) -> float:
    """Train and write Phi with its tokenizer; return the loss on new texts."""
    training = pretrain_text.TRAINING
    tokenizer = pretrain_text.train_tokenizer(seed)
    model = _model(seed, end=tokenizer.eos_token_id)
    trained = replace(training, steps=steps) if steps is not None else training
    loss = pretrain_text.train_text(model, tokenizer, trained, seed)
    phi = phi_layout(model)
    with whole_folder(out / PHI) as partial:
        phi.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return loss


def eva_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `eva_vit_g.pth`: flat, fp16, with a block that BLIP-2 leaves out, and EVA-CLIP's final norm and head."""
    prefix, width, depth = "visual_encoder.", pretrain_vision.WIDTH, pretrain_vision.EVA_VIT["num_hidden_layers"]
    found = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix) and not n.endswith("k_bias")}
    last = f"blocks.{depth - 1}."
    extra = {f"blocks.{depth}.{n.removeprefix(last)}": t.clone() for n, t in found.items() if n.startswith(last)}
    extra |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    extra |= {"head.weight": torch.zeros(8, width), "head.bias": torch.zeros(8)}
    return {name: tensor.half() for name, tensor in (found | extra).items()}


def blip2_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `model` of `blip2_pretrained_flant5xxl.pth`: LAVIS's names, fp32, next to parts that TinyGPT-V leaves out."""
    width = pretrain_vision.QFORMER["hidden_size"]
    parts = ("query_tokens", "ln_vision.", "qformer.")
    found = {original_name(name): tensor for name, tensor in weights.items() if name.startswith(parts)}
    extra = {"t5_proj.weight": torch.zeros(8, width), "t5_proj.bias": torch.zeros(8)}
    extra |= {"Qformer.bert.embeddings.word_embeddings.weight": torch.zeros(8, width)}
    extra |= {"Qformer.bert.embeddings.position_embeddings.weight": torch.zeros(8, width)}
    return found | extra


def phi_layout(model: TinyGPTVForConditionalGeneration) -> PhiForCausalLM:
    """A plain Phi as transformers has it: q, k and v apart, without the norms that TinyGPT-V adds."""
    text = model.config.text_config
    phi = PhiForCausalLM(PhiConfig(**{**text.to_dict(), "qk_layernorm": False}))
    plain = {name: in_memory(t) for name, t in model.state_dict().items() if not ADDED_NORMS.fullmatch(name)}
    split = to_layout(plain, text.num_attention_heads, "split")
    phi.load_state_dict({name: stored.read() for name, stored in split.items()})
    return phi


def _save(value: dict, path: Path) -> None:
    """Write a file atomically."""
    with whole_file(path) as partial:
        torch.save(value, partial)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    run_command(lambda: print(make_standins(arguments.out, seed=arguments.seed)))
