"""The quick start's stand-ins: the released files' layouts, loadable by the converters, made once."""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.forked import fork_context
from safetensors import safe_open
from transformers import AutoTokenizer, PhiForCausalLM

from stages.tiny import pretrain_text, pretrain_vision, quickstart, standins
from tinygptv_ds.config.recipe import ModelSection, TextSection
from tinygptv_ds.weights.assemble import build_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the stand-ins in forked processes, which do not import torch again."""
    out = tmp_path_factory.mktemp("standins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standins, "WorkerPool", lambda workers, remedy: ProcessPoolExecutor(workers, fork_context()))
        standins.make_standins(out, seed=1, steps=2)
    return out


def section(folder: Path) -> ModelSection:
    paths = {"phi": folder / standins.PHI, "eva_vit": folder / standins.EVA_VIT, "qformer": folder / standins.QFORMER}
    sizes = {"image_size": 84, "eva_vit_depth": 3, "eva_vit_heads": 4, "qformer_heads": 4, "proj_hidden_size": 128}
    return ModelSection(**{name: str(path) for name, path in paths.items()}, **sizes)


def test_the_model_is_built_from_them_and_runs(made):
    model = build_model(section(made), TextSection(), frozen_dtype=torch.float32)
    features = model.encode_vision(torch.zeros(2, 3, 84, 84, dtype=torch.uint8))
    assert features.shape == (2, pretrain_vision.CELLS, pretrain_vision.WIDTH)
    assert model.config.image_token_id == pretrain_text.PHI["vocab_size"] - 1


def test_phi_is_a_plain_phi_with_q_k_and_v_apart(made):
    with safe_open(made / "phi/model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"} <= names
    assert not any("layernorm" in name and "input_" not in name and "final_" not in name for name in names)
    _, report = PhiForCausalLM.from_pretrained(made / "phi", output_loading_info=True)
    assert not any(report.values())


def test_phi_weights_are_those_that_were_trained(made):
    # the q, k and v of the plain layout have to come back as the rows that were trained together
    tokenizer = AutoTokenizer.from_pretrained(made / "phi")
    trained = standins._model(1, tokenizer.eos_token_id)
    pretrain_text.train_text(trained, tokenizer, replace(pretrain_text.TRAINING, steps=2), seed=1)
    loaded = build_model(section(made), TextSection(), frozen_dtype=torch.float32).language_model.state_dict()
    for name, tensor in trained.language_model.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, msg=name, rtol=1e-3, atol=1e-3)


def test_tokenizer_is_of_phi_2s_kind(made):
    tokenizer = AutoTokenizer.from_pretrained(made / "phi")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end == max(tokenizer.get_vocab().values()) < pretrain_text.PHI["vocab_size"] - 1
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.unk_token_id == end
    assert len(tokenizer.encode("###")) == len(tokenizer.encode("\n")) == 1
    assert tokenizer.encode("seven###")[-1:] == tokenizer.encode("{<1><2><3><4>}###")[-1:] == tokenizer.encode("###")
    for number in range(101):
        assert len(tokenizer.encode(str(number))) == 1
        assert str(number) in tokenizer.convert_ids_to_tokens(tokenizer.encode(f"{{<{number}><5>"))
    text = "[INST] <Img>é\u4e2d {<1><20>} [vqa] what digit is red? [/INST]"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_eva_file_is_flat_half_precision_and_a_block_longer(made):
    weights = torch.load(made / standins.EVA_VIT)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    depth = pretrain_vision.EVA_VIT["num_hidden_layers"]
    assert {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")} == set(range(depth + 1))
    parts = "norm1.weight attn.q_bias attn.v_bias attn.qkv.weight attn.proj.bias norm2.bias mlp.fc1.weight mlp.fc2.bias"
    assert {f"blocks.0.{part}" for part in parts.split()} <= set(weights)
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight", "head.weight"} <= set(weights)


def test_blip2_file_has_lavis_names(made):
    (key, weights), *rest = torch.load(made / standins.QFORMER).items()
    assert key == "model" and not rest
    layer = "Qformer.bert.encoder.layer.0."
    parts = "attention.self.query crossattention.self.key crossattention.output.LayerNorm intermediate_query.dense"
    assert {f"{layer}{part}.weight" for part in parts.split()} <= set(weights)
    names = {"query_tokens", "ln_vision.weight", "Qformer.bert.embeddings.LayerNorm.bias", "t5_proj.weight"}
    assert names <= set(weights)
    assert not any(name.startswith("Qformer.bert.encoder.layer.1.crossattention") for name in weights)


def test_complete_ones_are_reused_and_others_made_again(made, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("made again")

    monkeypatch.setattr(standins, "WorkerPool", fail)
    before = (made / standins.MANIFEST).read_text()
    assert standins.make_standins(made, seed=1, steps=2) == json.loads(before)
    assert "reused" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="made again"):
        standins.make_standins(made, seed=2, steps=2)
    assert not (made / standins.MANIFEST).exists(), "half-made weights must not look complete"
    (made / standins.MANIFEST).write_text(before)


def test_the_projects_own_were_made_by_this_code():
    """The quick start copies them; what they were trained with is what the code would train them with today."""
    recorded = json.loads((quickstart.STANDINS / standins.MANIFEST).read_text())["settings"]
    current = standins._settings(quickstart.SEED, None)
    assert {**recorded, "code": None} == {**current, "code": None}  # comments may have changed since
    model = build_model(section(quickstart.STANDINS), TextSection(), frozen_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(quickstart.STANDINS / "phi")
    assert tokenizer.get_vocab() == pretrain_text.train_tokenizer(quickstart.SEED).get_vocab()
    teacher = pretrain_text.Teacher(
        pretrain_text.random.Random("held out"), tokenizer, pretrain_text.ImageTokens(model.config.image_token_id, 9)
    )
    with torch.no_grad():
        loss = pretrain_text.text_loss(model, teacher.texts(50)).item()
    assert loss < 0.5, "trained, not initial: 0.38 on 200 texts when they were made"


def test_the_quick_start_copies_them_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "WEIGHTS", tmp_path / "weights")
    assert quickstart.make_weights(train=False) and not quickstart.make_weights(train=False)
    assert "--train-standins" in capsys.readouterr().out
    for file in quickstart.STANDINS.rglob("*"):
        copy = tmp_path / "weights" / file.relative_to(quickstart.STANDINS)
        assert copy.is_dir() if file.is_dir() else copy.read_bytes() == file.read_bytes()


def test_cell_words_are_what_is_in_the_scene(made):
    tokenizer = AutoTokenizer.from_pretrained(made / "phi")
    teacher = pretrain_text.Teacher(pretrain_text.random.Random(0), tokenizer, pretrain_text.ImageTokens(639, 9))
    digits = pretrain_text.digits
    scene = digits.draw(pretrain_text.random.Random(0), "train", [(0, "seven", "red")])
    cells = teacher.cells(scene)
    assert tokenizer.decode(cells[0]) == "redseventop-left"
    assert tokenizer.decode(cells[8]) == "emptybottom-right"


def test_scene_batches_tell_the_truth():
    digits = pretrain_text.digits
    scene = digits.draw(pretrain_text.random.Random(0), "train", [(5, "seven", "blue")])
    pixels, truth = pretrain_vision.scene_batch([scene])
    assert pixels.shape == (1, 3, 84, 84)
    assert truth.value[0].tolist() == [-1] * 5 + [7] + [-1] * 3
    assert truth.color[0].tolist() == [0] * 5 + [1 + list(digits.COLORS).index("blue")] + [0] * 3
    x1, y1, x2, y2 = scene.digits[0].box
    expected = torch.tensor([x1 - 56, y1 - 28, x2 - 56, y2 - 28]) / 28
    torch.testing.assert_close(truth.box[0, 5], expected)
    cell, quarter = pretrain_vision.patch_grid()
    assert cell.reshape(6, 6)[2, 4] == 5 and quarter.reshape(6, 6)[3, 5] == 3
