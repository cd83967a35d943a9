"""The evaluation section of a recipe: what is scored while training. Checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field

from tinygptv_ds.config.data_section import check_name
from tinygptv_ds.config.limits import check_limits
from tinygptv_ds.config.nearest import nearest
from tinygptv_ds.config.template_names import BENCHMARK, check_template
from tinygptv_ds.errors import require, shown

HELD_OUT = ("vqa", "refer", "caption")  # kinds of held-out shards
# Every published benchmark with its splits, the first being the one that is scored unless another is named.
SPLITS: dict[str, tuple[str, ...]] = {
    "gqa": (),
    "vsr": (),
    "iconvqa": (),
    "vizwiz": (),
    "hm": (),
    "okvqa": (),
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
}


@dataclass(frozen=True)
class ScoredSection:
    """One set of questions that is scored."""

    kind: str
    """vqa, refer or caption for held-out shards, or a published benchmark: gqa, vsr, iconvqa, vizwiz, hm, okvqa,
    refcoco, refcoco+, refcocog."""

    shards: str | None = None
    """For held-out kinds: a folder, glob or brace pattern of shards."""

    root: str | None = None
    """For benchmarks: the folder that holds it in the layout of docs/evaluation.md."""

    places: dict = field(default_factory=dict)
    """Other paths for some of these files, e.g. {images: PATH}."""

    split: str | None = None
    """Split of a RefCOCO benchmark; null: val."""

    name: str | None = None
    """Name in logs and on TensorBoard; null: the kind, with the split where there are several."""

    template: str | None = None
    """training: the recipe's own template; benchmark: that of the published scripts; A, B, C: those of
    docs/use/inference.md; anything else is a template itself, with {} for the question. null: training for held-out
    shards, else benchmark."""

    add_bos_token: bool | None = None
    """Start prompts with the BOS token, as training does; null: on held-out shards, unless template is A or C."""

    instruction: str | None = None
    """For held-out kinds: ask with these words, with {} for the stored question, instead of the record's own; null:
    as the record was trained with."""

    def __post_init__(self) -> None:
        kinds = (*HELD_OUT, *SPLITS)
        check_name(self.label, "evaluation.benchmarks: name")
        where = f"evaluation.benchmarks, {self.label}"
        require(
            self.kind in kinds, f"evaluation.benchmarks: kind {shown(self.kind)} is unknown{nearest(self.kind, kinds)}"
        )
        if self.kind in HELD_OUT:
            require(self.shards is not None, f"{where}: name its held-out shards with shards")
            require(
                not (self.root or self.split or self.places),
                f"{where}: root, split and places are of published benchmarks",
            )
        else:
            require(self.root is not None, f"{where}: name the folder of its files with root")
            require(self.shards is None, f"{where}: shards are of the kinds {', '.join(HELD_OUT)}")
            require(self.instruction is None, f"{where}: instruction is of the kinds {', '.join(HELD_OUT)}")
            splits = SPLITS[self.kind]
            known = f"its splits are {', '.join(splits)}" if splits else "it has no splits"
            require(self.split is None or self.split in splits, f"{where}: split {shown(self.split)}: {known}")
        check_template(self.template, f"{where}: template")
        require(
            self.kind not in HELD_OUT or self.template != BENCHMARK,
            f"{where}: held-out shards have no template of a benchmark",
        )

    @property
    def label(self) -> str:
        """The name in logs."""
        split = self.split or next(iter(SPLITS.get(self.kind, ())), None)
        return self.name or (f"{self.kind}_{split}" if split else self.kind)


@dataclass(frozen=True)
class EvaluationSection:
    """Scores while training, logged as `eval/NAME/strict` and so on."""

    benchmarks: list[ScoredSection] = field(default_factory=list)
    """What is scored, e.g. [{kind: vqa, shards: data/held_out}, {kind: gqa, root: benchmarks}]; empty: nothing
    (docs/evaluation.md)."""

    every: int = 0
    """Steps between scores, which are on TensorBoard as eval/NAME/strict; 0: only at the end."""

    limit: int | None = 200
    """Only the first questions of each; null: all."""

    batch_size: int = 16
    """Questions that one GPU answers at once."""

    max_new_tokens: int | None = None
    """Tokens of an answer at most; null: 20, as published, and on held-out shards as many as the longest true answer
    takes."""

    def __post_init__(self) -> None:
        check_limits(
            "evaluation", self, every=1_000_000_000, limit=1_000_000_000, batch_size=100_000, max_new_tokens=10_000
        )
        require(self.every >= 0, "evaluation.every must be 0 or more")
        require(self.limit is None or self.limit > 0, "evaluation.limit must be positive, or null for all questions")
        require(self.batch_size > 0, "evaluation.batch_size must be positive")
        require(self.max_new_tokens is None or self.max_new_tokens > 0, "evaluation.max_new_tokens must be positive")
        labels = [benchmark.label for benchmark in self.benchmarks]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        require(not twice, f"evaluation.benchmarks: {', '.join(twice)} appears more than once; give each a name")
        require(not self.every or bool(self.benchmarks), "evaluation.every is set, but evaluation.benchmarks is empty")
