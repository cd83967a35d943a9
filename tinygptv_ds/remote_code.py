"""The code that is saved with a model, so that transformers loads it without this package, by `trust_remote_code`.

It is this package's own code: of each module, the definitions that the model's classes need, comments included, are
joined into three files that import only torch, timm, transformers, numpy, Pillow and each other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tinygptv_ds import __version__
from tinygptv_ds.resources import project_root

_PACKAGE = "tinygptv_ds"
_ROOT = Path(__file__).resolve().parent


class Definition(NamedTuple):
    """A name at the top of a module, e.g. `tinygptv_ds.models.lora` and `LoRALinear`."""

    module: str
    name: str


# The files: the title of each, a module, and its classes that the file is for. A file imports what the modules of
# earlier files define.
_FILES = {
    "configuration_tinygptv": ("Configuration of TinyGPT-V", "models.configuration", ("TinyGPTVConfig",)),
    "modeling_tinygptv": (
        "Model of TinyGPT-V",
        "models.tinygptv",
        ("TinyGPTVForConditionalGeneration", "NoSuchAutoModel"),
    ),
    "processing_tinygptv": ("Processor of TinyGPT-V", "processing.processor", ("TinyGPTVProcessor",)),
}
# Outside of this package Pillow alone reads images, without simplejpeg and numba: slower, and the same pixels.
_REPLACED = {
    Definition(f"{_PACKAGE}.processing.image", "to_pixels"): Definition(
        f"{_PACKAGE}.processing.pillow_pixels", "to_pixels"
    )
}
_LEFT_OUT = Definition(f"{_PACKAGE}.remote_code", "SavedWithCode")  # transformers itself copies code that it has loaded

AUTO_MAPS = {
    "TinyGPTVConfig": {
        "AutoConfig": "configuration_tinygptv.TinyGPTVConfig",
        "AutoModelForImageTextToText": "modeling_tinygptv.TinyGPTVForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_tinygptv.TinyGPTVForConditionalGeneration",
        "AutoModel": "modeling_tinygptv.NoSuchAutoModel",
        "AutoModelForCausalLM": "modeling_tinygptv.NoSuchAutoModel",
    },
    "TinyGPTVProcessor": {"AutoProcessor": "processing_tinygptv.TinyGPTVProcessor"},
    "TinyGPTVImageProcessor": {"AutoImageProcessor": "processing_tinygptv.TinyGPTVImageProcessor"},
}


class SavedWithCode:
    """A configuration or processor that is saved with the code that loads it where this package is not installed."""

    def to_json_file(self, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        """Write the JSON, which every way of saving comes to, with the code next to it."""
        self.auto_map = next(
            dict(AUTO_MAPS[kind.__name__]) for kind in type(self).__mro__ if kind.__name__ in AUTO_MAPS
        )
        write_code(Path(json_file_path).parent)
        super().to_json_file(json_file_path, *args, **kwargs)  # type: ignore[misc]  # of the class that it is mixed into


def write_code(folder: Path) -> None:
    """Write the files of `generated_code` into a folder."""
    for name, text in generated_code().items():
        (folder / name).write_text(text, encoding="utf-8")


@lru_cache(maxsize=1)
def generated_code() -> dict[str, str]:
    """Return the text of each file by its name, the same for the same version of this package."""
    modules: dict[str, _Module] = {}
    earlier: dict[Definition, str] = {}
    texts = {}
    for name, (title, module, classes) in _FILES.items():
        collector = _Collector(modules, dict(earlier))
        for wanted in classes:
            collector.add(Definition(f"{_PACKAGE}.{module}", wanted))
        texts[f"{name}.py"] = collector.text(title)
        earlier |= dict.fromkeys(collector.of_module(f"{_PACKAGE}.{module}"), name)
    return texts


class _Import(NamedTuple):
    """One name of an import from another package; `origin` is empty in `import x`."""

    origin: str
    name: str


@dataclass
class _Module:
    """A parsed module of this package.

    Attributes:
        lines: its source.
        definitions: the statements that make each name at its top.
        own_imports: the definition of this package that an imported name refers to.
        imports: what is imported under each name from other packages.
        dropped: numbers of the lines that import from this package inside functions.
    """

    lines: list[str]
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    own_imports: dict[str, Definition] = field(default_factory=dict)
    imports: dict[str, set[_Import]] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)

    @classmethod
    def read(cls, name: str) -> _Module:
        """Read a module by its dotted name."""
        source = _ROOT.joinpath(*name.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")
        tree = ast.parse(source)
        module = cls(source.splitlines())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inner = {node for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module._add_import(node, inside_function=node in inner)
        for statement in tree.body:
            for target in _targets(statement):
                module.definitions.setdefault(target, []).append(statement)
        return module

    def _add_import(self, node: ast.Import | ast.ImportFrom, *, inside_function: bool) -> None:
        origin = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if origin.split(".")[0] == _PACKAGE:
            if any(alias.asname is not None for alias in node.names):
                raise ValueError(f"line {node.lineno} imports under another name, which a joined file cannot do")
            self.own_imports |= {alias.name: Definition(origin, alias.name) for alias in node.names}
            if inside_function:
                self.dropped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif not inside_function:
            for alias in node.names:
                renamed = "" if alias.asname is None else f" as {alias.asname}"
                name = alias.asname or alias.name.split(".")[0]
                self.imports.setdefault(name, set()).add(_Import(origin, alias.name + renamed))

    def statements(self, names: Iterable[str]) -> list[ast.stmt]:
        """Return the statements that define some names, in order."""
        return sorted({s for name in names for s in self.definitions[name]}, key=lambda s: s.lineno)

    def source(self, statement: ast.stmt) -> str:
        """Return the source of a statement with the comment above it, without what is of no use in another package."""
        decorators = getattr(statement, "decorator_list", [])
        first = min([statement.lineno, *(decorator.lineno for decorator in decorators)])
        while self.lines[first - 2].startswith("#"):
            first -= 1
        numbers = range(first, (statement.end_lineno or first) + 1)
        lines = {number: self.lines[number - 1] for number in numbers if number not in self.dropped}
        if isinstance(statement, ast.ClassDef):
            bases = [ast.unparse(base) for base in statement.bases]
            kept = [base for base in bases if self.own_imports.get(base) != _LEFT_OUT]
            line = lines[statement.lineno]
            lines[statement.lineno] = line.replace(f"({', '.join(bases)}", f"({', '.join(kept)}", 1)
        return "\n".join(lines.values())


class _Collector:
    """Collects a definition, and all that it needs, for one file.

    Args:
        modules: modules read so far.
        elsewhere: definitions that are imported from other files.
    """

    def __init__(self, modules: dict[str, _Module], elsewhere: dict[Definition, str]) -> None:
        self._modules, self._elsewhere = modules, elsewhere
        self._taken: dict[str, str] = {}  # the module of each name
        self._imports: set[_Import] = set()

    def add(self, wanted: Definition) -> None:
        """Add a definition.

        Raises:
            ValueError: the package has no such name, or another module's of that name is in the file already.
        """
        wanted = _REPLACED.get(wanted, wanted)
        module = self._module(wanted.module)
        if wanted in self._elsewhere:
            self._imports.add(_Import(f".{self._elsewhere[wanted]}", wanted.name))
        elif wanted.name in module.definitions and wanted != _LEFT_OUT:
            self._take(wanted, module)
        elif wanted.name in module.own_imports:
            self.add(module.own_imports[wanted.name])
        elif wanted != _LEFT_OUT:
            raise ValueError(f"{wanted.module} defines no {wanted.name}")

    def _take(self, wanted: Definition, module: _Module) -> None:
        there = self._taken.setdefault(wanted.name, "")
        if there not in ("", wanted.module):
            raise ValueError(f"{wanted.name} is defined in {there} and {wanted.module}; rename one of them")
        if there:
            return
        self._taken[wanted.name] = wanted.module
        for name in sorted({name for statement in module.definitions[wanted.name] for name in _names(statement)}):
            if name in module.definitions:
                self._take(Definition(wanted.module, name), module)
            elif name in module.own_imports:
                self.add(module.own_imports[name])
            else:
                self._imports |= module.imports.get(name, set())

    def of_module(self, module: str) -> set[Definition]:
        """Return what the file has of a module."""
        return {Definition(module, name) for name, there in self._taken.items() if there == module}

    def _module(self, name: str) -> _Module:
        if name not in self._modules:
            self._modules[name] = _Module.read(name)
        return self._modules[name]

    def text(self, title: str) -> str:
        """Return the whole file."""
        parts = [_header(title), "from __future__ import annotations", self._import_lines()]
        for name in self._module_order():
            module = self._module(name)
            parts.append(f"\n# From {name.replace('.', '/')}.py")
            for statement in module.statements(each.name for each in self.of_module(name)):
                # Constants in successive lines stay together.
                plain = isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign)
                parts.append(("" if plain else "\n") + module.source(statement))
        return "\n\n".join(parts) + "\n"

    def _import_lines(self) -> str:
        whole = [f"import {each.name}" for each in sorted(self._imports) if not each.origin]
        origins = sorted({each.origin for each in self._imports} - {""}, key=lambda o: (o.startswith("."), o))
        names = {o: sorted(each.name for each in self._imports if each.origin == o) for o in origins}
        return "\n".join([*whole, *(f"from {origin} import {', '.join(names[origin])}" for origin in origins)])

    def _module_order(self) -> list[str]:
        """Return the modules of the file, each after those that it imports."""
        order: dict[str, None] = {}

        def visit(name: str) -> None:
            if name not in order:
                for found in self._module(name).own_imports.values():
                    if _REPLACED.get(found, found).module in wanted:
                        visit(_REPLACED.get(found, found).module)
                order[name] = None

        wanted = set(self._taken.values())
        for name in sorted(wanted):
            visit(name)
        return list(order)


def _header(title: str) -> str:
    license_text = (project_root() / "LICENSE").read_text(encoding="utf-8").strip()
    comment = "\n".join(f"# {line}".rstrip() for line in license_text.splitlines())
    return f'{comment}\n\n"""{title}, generated from the source of {_PACKAGE} {__version__}: do not edit."""'


def _targets(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement at the top of a module defines or changes."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    for target in targets:
        yield from (node.id for node in ast.walk(target or ast.Pass()) if isinstance(node, ast.Name))


def _names(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement uses, annotations included."""
    yield from (node.id for node in ast.walk(statement) if isinstance(node, ast.Name))
