"""The table of datasets: the files that each needs below ``--root``, and where they come from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tinygptv_ds.data.sets import caption_folder, captions, flickr, llava, ocrvqa, own, refcoco, refvg, unnatural, vqa
from tinygptv_ds.data.sets.common import COCO, Entry, PreparedSample, Skipped
from tinygptv_ds.errors import DataError

__all__ = ["DATASETS", "Dataset", "PreparedSample", "Skipped", "full_name", "how_to_get"]


@dataclass(frozen=True)
class Dataset:
    """A dataset of the table, with the function that turns its own files into samples.

    `samples(root)` yields them, `files` are the files and folders it needs below the root, `source` is where to
    get them. `samples` is None for datasets that are published as shards and need no preparation. `optional`
    files are used if present. A user's `own` data may be elsewhere; `samples` is then called with ``annotations``,
    ``image_root`` or both, and with ``columns`` if `any_keys` is set: the entries' keys are not fixed. With
    `whole_folder` it depends on all files below the root.
    """

    samples: Callable[..., Iterator[Entry]] | None
    files: tuple[str, ...]
    source: str
    optional: tuple[str, ...] = ()
    own: bool = False
    any_keys: bool = False
    whole_folder: bool = False


# Files and folders that take the place of one of the table's in another common layout.
OTHER_LAYOUTS = {
    "*.json*": ("*.ndjson", "*.parquet", "*.csv", "*.tsv"),
    COCO: ("coco/train2017",),
    "coco_caption/coco_karpathy_train.json": ("coco_caption/captions_train2014.json",),
    "textcaps/train_images": ("textcaps/train_val_images/train_images",),
    "vqav2/vqa_train.json": ("vqav2/v2_*mscoco_train2014_*.json",),
    "vqav2/vqa_val.json": ("vqav2/v2_*mscoco_val2014_*.json",),
    "okvqa/okvqa_train.json": ("okvqa/*mscoco_train2014_*.json",),
    f"{refvg.FOLDER}/VG_100K": (f"{refvg.FOLDER}/images",),
    f"{refvg.FOLDER}/VG_100K_2": (f"{refvg.FOLDER}/images", f"{refvg.FOLDER}/VG_100K"),
}

_COCO = "images: COCO 2014 train2014.zip from cocodataset.org"
_LLAVA = f"LLaVA-Instruct-150K (Hugging Face liuhaotian/LLaVA-Instruct-150K); {_COCO}"
_REFCOCO = f"REFER annotations (github.com/lichengunc/refer); {_COCO}"
_FLICKR = (
    "MiniGPT-v2's filtered Flickr30k (Vision-CAIR/MiniGPT-4, dataset/README_MINIGPTv2_FINETUNE.md; link of the day)"
)
_BLIP = "storage.googleapis.com/sfr-vision-language-research/BLIP/datasets"
_LAVIS = f"LAVIS annotations (storage.googleapis.com/sfr-vision-language-research/LAVIS/datasets); {_COCO}"
_IMG2DATASET = "with img2dataset --output_format webdataset --image_size 224 --caption_col caption"


def _refcoco(name: str, split_by: str, *, inverse: bool = False) -> Dataset:
    folder = f"refcoco_annotations/{name}"
    files = (f"{folder}/instances.json", f"{folder}/refs({split_by}).p", COCO)
    return Dataset(partial(refcoco.refcoco, name=name, split_by=split_by, inverse=inverse), files, _REFCOCO)


def _llava(adapter: Callable[..., Iterator[Entry]], file: str, source: str = _LLAVA) -> Dataset:
    return Dataset(partial(adapter, file=file), (file, COCO), source)


def _flickr(adapter: Callable[[Path], Iterator[Entry]], file: str) -> Dataset:
    return Dataset(adapter, (f"{flickr.FOLDER}/{file}", f"{flickr.FOLDER}/images"), _FLICKR)


def _vqa(*files: str, answers: str = "answer") -> Dataset:
    samples = partial(vqa.coco_question, files=files, answers=answers)
    return Dataset(samples, (files[0], COCO), _LAVIS, optional=files[1:])


DATASETS: dict[str, Dataset] = {
    # stages 1 and 2
    "laion": Dataset(None, (), f"{_BLIP}: laion_synthetic_filtered_large.json, {_IMG2DATASET}"),
    "cc_sbu": Dataset(None, (), f"{_BLIP}: ccs_synthetic_filtered_large.json, {_IMG2DATASET}"),
    # stage 3
    "cc_sbu_align": Dataset(
        captions.cc_sbu_align,
        ("cc_sbu_align/filter_cap.json", "cc_sbu_align/image"),
        "MiniGPT-4's stage-2 set (Vision-CAIR/MiniGPT-4, dataset/README_2_STAGE.md)",
    ),
    # stage 4
    "multitask_conversation": _llava(
        llava.conversation,
        "multitask_conversation/multitask_conversation.json",
        f"MiniGPT-v2's release (Vision-CAIR/MiniGPT-4, dataset/README_MINIGPTv2_FINETUNE.md); {_COCO}",
    ),
    "llava_conversation": _llava(llava.conversation, "llava/conversation_58k.json"),
    "llava_detail": _llava(llava.first_turn, "llava/detail_23k.json"),
    "llava_reason": _llava(llava.first_turn, "llava/complex_reasoning_77k.json"),
    "unnatural_instruction": Dataset(
        unnatural.unnatural_instruction,
        ("unnatural_instruction/filtered_unnatural_instruction.json",),
        "MiniGPT-v2's filtered Unnatural Instructions (Vision-CAIR/MiniGPT-4, dataset/README_MINIGPTv2_FINETUNE.md)",
    ),
    "refvg": Dataset(
        refvg.refvg,
        tuple(f"{refvg.FOLDER}/{n}" for n in ("image_data.json", "region_descriptions.json", "VG_100K", "VG_100K_2")),
        "Visual Genome (homes.cs.washington.edu/~ranjay/visualgenome): images parts 1 and 2, region descriptions",
    ),
    "flickr_grounded_caption": _flickr(flickr.flickr_grounded_caption, "groundedcaption.json"),
    "flickr_CaptionToPhrase": _flickr(flickr.flickr_caption_to_phrase, "captiontobbox.json"),
    "flickr_ObjectToPhrase": _flickr(flickr.flickr_object_to_phrase, "phrasetobbox.json"),
    "coco_caption": Dataset(
        captions.coco_caption,
        ("coco_caption/coco_karpathy_train.json", COCO),
        f"BLIP's coco_karpathy_train.json ({_BLIP.replace('/BLIP', '')}); {_COCO}",
    ),
    "textcaps_caption": Dataset(
        captions.textcaps_caption,
        ("textcaps/TextCaps_0.1_train.json", "textcaps/train_images"),
        "TextCaps 0.1 and the TextVQA training images (textvqa.org)",
    ),
    "refcoco": _refcoco("refcoco", "unc"),
    "refcocop": _refcoco("refcoco+", "unc"),
    "refcocog": _refcoco("refcocog", "umd"),
    "invrefcoco": _refcoco("refcoco", "unc", inverse=True),
    "invrefcocop": _refcoco("refcoco+", "unc", inverse=True),
    "invrefcocog": _refcoco("refcocog", "umd", inverse=True),
    "coco_vqa": _vqa("vqav2/vqa_train.json", "vqav2/vqa_val.json"),
    "ok_vqa": _vqa("okvqa/okvqa_train.json"),
    "aok_vqa": _vqa("aokvqa/aokvqa_v1p0_train.json", answers="direct_answers"),
    "gqa": Dataset(
        vqa.gqa,
        ("gqa/train_balanced_questions.json", "gqa/images"),
        "GQA (cs.stanford.edu/people/dorarad/gqa): images, and the questions there or as LAVIS lists them",
    ),
    "ocrvqa": Dataset(ocrvqa.ocrvqa, ("ocrvqa/dataset.json", "ocrvqa/images"), "OCR-VQA (ocr-vqa.github.io)"),
    # held-out expressions, for eval/refer.py
    "refer": Dataset(
        refcoco.refer,
        ("*.json",),
        f"MiniGPT-v2's evaluation files, such as refcoco_testA.json (Vision-CAIR/MiniGPT-4, eval_scripts); {_COCO}",
        own=True,
    ),
    # your own
    "llava": Dataset(
        own.llava,
        ("*.json*",),
        "your own conversations or questions, as LLaVA, ms-swift or LLaMA-Factory write them, next to your images",
        own=True,
        any_keys=True,
    ),
    "jsonl": Dataset(own.jsonl, ("*.jsonl",), "your own JSON lines next to your images", own=True, any_keys=True),
    "caption-folder": Dataset(
        caption_folder.caption_folder,
        (),
        "your own images, each with its caption in a .txt next to it, or in a table with columns file_name, caption",
        optional=("*.csv", "*.tsv", "*.parquet", "metadata.jsonl"),
        own=True,
        any_keys=True,
        whole_folder=True,
    ),
}


def full_name(name: str) -> str:
    """Return the table's spelling of `name`. Raises DataError for an unknown dataset."""
    name = {"caption_folder": "caption-folder"}.get(name, name)
    if name not in DATASETS:
        raise DataError(f"no dataset is called {name!r}; choose one of digits, {', '.join(DATASETS)}")
    return name


def how_to_get(name: str) -> str:
    """Return lines for an error message: where dataset `name`, known or not, comes from and how to prepare it."""
    command = "tinygptv-ds prepare"
    if name.startswith("digits"):
        return f"{name} is embedded; make it with: {command} digits --out DIR"
    if name not in DATASETS:
        return f"{name} is not in the table of datasets; make shards of your own data with: {command} jsonl --help"
    entry = DATASETS[name]
    if entry.samples is None:
        return (
            f"{name} is used as img2dataset downloads it, without preparation: name its tars in the recipe\n"
            f"  from: {entry.source}\n  its JSON as a TSV for img2dataset: tinygptv-ds convert-{name.replace('_', '-')}"
        )
    files = [*(_with_others(file) for file in entry.files), *(f"{file} (if there is one)" for file in entry.optional)]
    lines = [f"{name} needs", *(f"  ROOT/{file}" for file in files)] if files else [name]
    return "\n".join([*lines, f"  from: {entry.source}", f"  then: {command} {name} --root ROOT --out DIR"])


def _with_others(file: str) -> str:
    return file + "".join(f", or {other}" for other in OTHER_LAYOUTS.get(file, ()))
