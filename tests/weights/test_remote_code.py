"""An exported folder loads where this package is not installed, and its code computes the same bits."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.alone import run_alone
from helpers.verbs import call
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from tinygptv_ds import remote_code
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.remote_code import Definition, generated_code
from tinygptv_ds.weights.export import export as verb

FILES = ["configuration_tinygptv.py", "modeling_tinygptv.py", "processing_tinygptv.py"]
PROMPT = {
    "input_ids": torch.tensor([[9, 1, 19, 19, 19, 2, 3], [1, 19, 19, 19, 2, 3, 4]]),
    "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7]),
    "pixel_values": torch.arange(6 * 28 * 28, dtype=torch.uint8).reshape(2, 3, 28, 28),
}
# Runs with this package and without it; MODEL is the folder.
USE = """
import torch
from pathlib import Path
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, pipeline

torch.set_num_threads(1)
config = AutoConfig.from_pretrained(MODEL, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(MODEL, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(MODEL, trust_remote_code=True)
inputs = torch.load("prompt.pt")
images = [str(path) for path in sorted(Path("images").iterdir())]
with torch.no_grad():
    found = {"logits": model(**inputs).logits, "tokens": model.generate(**inputs, max_new_tokens=5, do_sample=False)}
found |= processor(images, [processor.prompt("w1 w2")] * len(images), add_bos_token=True)
reader = AutoImageProcessor.from_pretrained(MODEL, trust_remote_code=True)
assert type(reader) is type(processor.image_processor) and reader.to_dict() == processor.image_processor.to_dict()
found["alone"] = reader(images, return_tensors="pt")["pixel_values"]
"""
WITHOUT_THIS_PACKAGE = """
modules = [type(each).__module__.split(".") for each in (config, model, processor, reader)]
assert [(names[0], names[1]) for names in modules] == [("transformers_modules", Path(MODEL).name)] * 4, modules
torch.save(found, Path(MODEL).name + ".pt")
for each in (model, processor):
    each.save_pretrained("again")
reader.save_pretrained("reader")
assert AutoImageProcessor.from_pretrained("reader", trust_remote_code=True).to_dict() == reader.to_dict()
"""


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    call(verb, run, "--out", tmp_path / "out", "--dtype", "fp32")
    return tmp_path / "out"


def write_images(folder: Path) -> None:
    """Images of several shapes, modes and formats."""
    folder.mkdir()
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))

    noise(200, 40, 3).save(folder / "tall.png")
    noise(30, 90, 3).save(folder / "wide.jpg", quality=80)
    noise(300, 310).save(folder / "gray.jpg")
    noise(20, 20, 4).save(folder / "transparent.webp", lossless=True)
    Image.fromarray(rng.integers(0, 4000, (50, 60), dtype=np.uint16)).save(folder / "deep.png")


def in_this_process(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.chdir(tmp_path)
    names: dict = {"MODEL": str(model)}
    exec(USE, names)
    assert type(names["model"]) is TinyGPTVForConditionalGeneration
    assert type(names["processor"]) is TinyGPTVProcessor
    assert torch.equal(names["found"]["alone"], names["found"]["pixel_values"])
    return names["found"]


def test_the_same_bits_without_this_package(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, tokens and pixels; also of the copy that the classes without this package have saved."""
    torch.save(PROMPT, tmp_path / "prompt.pt")
    write_images(tmp_path / "images")
    expected = in_this_process(exported, tmp_path, monkeypatch)
    models = [exported, tmp_path / "again"]
    run_alone("".join(f"MODEL = {str(model)!r}" + USE + WITHOUT_THIS_PACKAGE for model in models), tmp_path)
    for model in models:
        found = torch.load(tmp_path / f"{model.name}.pt")
        assert found.keys() == expected.keys()
        assert {name: torch.equal(found[name], tensor) for name, tensor in expected.items()} == dict.fromkeys(
            found, True
        )
        assert [file for file in FILES if not (tmp_path / "again" / file).is_file()] == []


def test_refused_saved_again_and_from_a_configuration(exported: Path, tmp_path: Path) -> None:
    """Without trust nothing runs; the code goes with a copy saved with this package; a configuration is enough."""
    for kind in (AutoModelForImageTextToText, AutoProcessor):
        kind.from_pretrained(exported).save_pretrained(tmp_path / "again")
    for file in FILES:
        assert (tmp_path / "again" / file).read_text() == (exported / file).read_text()
    AutoConfig.from_pretrained(exported).save_pretrained(tmp_path / "config")
    script = f"""
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
try:
    AutoConfig.from_pretrained({str(exported)!r}, trust_remote_code=False)
except ValueError as error:
    print("trust_remote_code=True" in str(error))
for kind in (AutoModelForImageTextToText, AutoProcessor):
    print(type(kind.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)).__module__)
config = AutoConfig.from_pretrained({str(tmp_path / "config")!r}, trust_remote_code=True)
print(type(AutoModelForImageTextToText.from_config(config, trust_remote_code=True)).__module__)
"""
    refused, *modules = run_alone(script, tmp_path).split()
    assert refused == "True"
    loaded = [(names[1], names[-1]) for names in (module.split(".") for module in modules)]
    assert loaded == [
        ("again", "modeling_tinygptv"),
        ("again", "processing_tinygptv"),
        ("config", "modeling_tinygptv"),
    ]


def test_what_the_code_imports() -> None:
    allowed = {"torch", "timm", "transformers", "numpy", "PIL"} | set(sys.stdlib_module_names)
    for text in generated_code().values():
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
        assert {name.split(".")[0] for name in names} <= allowed
        assert "BSD 3-Clause License" in text


def test_no_name_is_missing_or_unused(tmp_path: Path) -> None:
    for name, text in generated_code().items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_code_is_the_same_every_time() -> None:
    script = "from tinygptv_ds.remote_code import generated_code; print(repr(generated_code()))"
    environment = {"PYTHONPATH": str(Path(remote_code.__file__).parents[1]), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == generated_code()


def package(root: Path, **files: str) -> None:
    (root / "models").mkdir(parents=True)
    for name, text in files.items():
        (root / "models" / f"{name}.py").write_text(text)


def collect(root: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> str:
    package(root / "tinygptv_ds", **files)
    monkeypatch.setattr(remote_code, "_ROOT", root / "tinygptv_ds")
    collector = remote_code._Collector({}, {})
    collector.add(Definition("tinygptv_ds.models.a", "A"))
    return collector.text("Title").split("# From", 1)[1]


def test_only_what_is_needed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Definitions come after those that they use, with their comments, and without imports from the package."""
    text = collect(
        tmp_path,
        monkeypatch,
        a="""from tinygptv_ds.models.b import BASE, Base


# Why A is here.
class A(Base):
    def f(self):
        from tinygptv_ds.models.c import lazy

        return lazy(BASE)


class Unused:
    pass
""",
        b="LEFT = 1\nBASE = 2\nBASE += 1\n\n\nclass Base:\n    pass\n",
        c="def lazy(x):\n    return x\n",
    )
    assert "Unused" not in text
    assert "LEFT" not in text
    assert text.index("class Base") < text.index("# Why A is here.\nclass A")
    names: dict = {}
    exec("# From" + text, names)
    assert names["A"]().f() == 3


def test_two_definitions_of_a_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"_x is defined in tinygptv_ds\.models\.a and tinygptv_ds\.models\.b"):
        collect(
            tmp_path,
            monkeypatch,
            a="from tinygptv_ds.models.b import y\n_x = 1\nA = (_x, y)\n",
            b="_x = 2\ny = _x\n",
        )
