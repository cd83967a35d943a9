"""TinyGPT-V in lmms-eval, which finds it by its entry point if both are installed:

python -m lmms_eval --model tinygptv --model_args pretrained=MODEL --tasks TASK --batch_size 8
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from tinygptv_ds.distributed import ranks_from_env
from tinygptv_ds.dtypes import DTYPES
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.evaluation.benchmarks.question import Benchmark
from tinygptv_ds.evaluation.runner import choose_device
from tinygptv_ds.evaluation.wording import Settings, wording
from tinygptv_ds.generate.candidates import Choice, candidate_losses
from tinygptv_ds.generate.conversation import Conversation, Prompt
from tinygptv_ds.generate.generate import answers
from tinygptv_ds.generate.load import load_model
from tinygptv_ds.generate.settings import Generation

NAME = "tinygptv"
_DEFAULT_TOKENS = 64
_MAX_TOKENS = 4096  # of a context and of a continuation whose loss is computed: more than the model takes
_PLAIN = Benchmark(rules={})  # lmms-eval has the rules


def manifest() -> ModelManifest:
    """Return the entry for the entry point group `lmms_eval.models`."""
    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.TinyGPTV")


class TinyGPTV(lmms):
    """The model for tasks with images or only text; under `accelerate launch` on several GPUs, too.

    Args:
        pretrained: an exported folder, a run, a checkpoint or a file.
        batch_size: requests per batch.
        dtype: fp32, bf16 or fp16; auto: bf16 on a GPU, else fp32.
        template: "training", or another template of docs/use/inference.md.
        add_bos_token: start prompts with the BOS token, as in training.
        device: ignored: the rank's GPU is used if there is one.
        other: arguments that lmms-eval passes to every model; those with a value are refused.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        dtype: str = "auto",
        template: str = "training",
        add_bos_token: bool = True,
        device: str | None = None,
        **other: Any,
    ) -> None:
        super().__init__()
        given = sorted(name for name, value in other.items() if value not in (None, "", {}, []))
        if given:
            raise ConfigError(f"--model_args: {', '.join(given)} is unknown; see {__name__}.TinyGPTV")
        ranks = ranks_from_env()
        self._rank, self._world_size = ranks.rank, ranks.world_size
        dtype = choose_device(dtype, ranks)
        if dtype not in DTYPES:
            raise ConfigError(f"--model_args dtype={dtype}: choose one of auto, {', '.join(DTYPES)}")
        self._model, self._processor = load_model(Path(pretrained), DTYPES[dtype])
        self._batch_size = int(batch_size)
        settings = Settings(template, add_bos_token=add_bos_token in (True, "True", "true"))
        config = self._model.config
        self._template = wording(_PLAIN, settings, config.prompt_template, config.end_sym).template

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._model.device

    @property
    def batch_size(self) -> int:
        """The number of requests per batch."""
        return self._batch_size

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate greedy answers, cut at the model's own end and at the task's `until`.

        Raises:
            ConfigError: a task asks for sampling or beam search.
        """
        groups: dict[int, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[_length(request.args[1])].append(number)
        found: dict[int, str] = {}
        with self._bar(len(requests)) as bar:
            for length, numbers in groups.items():
                for part in _parts(numbers, self._batch_size):
                    asked = [self._prompt(requests[n]) for n in part]
                    texts = self._answers(asked, length)
                    for number, text in zip(part, texts, strict=True):
                        found[number] = _cut(text, requests[number].args[1].get("until"))
                    bar.update(len(part))
        return [found[number] for number in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Compute the loss of each continuation, summed over its tokens, and whether greedy generation starts with it.

        A continuation follows the template directly, as answers do in training: spaces before it are removed. The
        continuations of one context are computed together.
        """
        of_context: dict[Hashable, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            of_context[(request.args[0], *request.args[3:])].append(number)
        found: dict[int, GenerationResult] = {}
        with self._bar(len(requests)) as bar:
            for part in _parts(list(of_context.values()), self._batch_size):
                asked = [self._prompt(requests[numbers[0]]) for numbers in part]
                candidates = [[self._continuation(requests[n]) for n in numbers] for numbers in part]
                losses = list(
                    candidate_losses(
                        self._model,
                        self._processor,
                        [Choice(prompt, texts) for prompt, texts in zip(asked, candidates, strict=True)],
                        end_sym="",
                        max_prompt_tokens=_MAX_TOKENS,
                        max_answer_tokens=_MAX_TOKENS,
                        batch_size=self._batch_size,
                    )
                )
                longest = max(int(each.tokens.max()) for each in losses)
                greedy = self._answers([replace(prompt, stop=()) for prompt in asked], max(longest, 1))
                for numbers, texts, loss, answer in zip(part, candidates, losses, greedy, strict=True):
                    sums = (loss.means.nan_to_num(0.0) * loss.tokens).tolist()
                    for number, text, total in zip(numbers, texts, sums, strict=True):
                        # lmms-eval 0.7.3 turns a bare pair into text, and chooses the lowest number, unlike its own
                        # description of this method. Remove when it takes pairs.
                        found[number] = GenerationResult((total, answer.startswith(text.strip())))
                bar.update(sum(map(len, part)))
        return [found[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raise NotImplementedError: TinyGPT-V's benchmarks have no such tasks."""
        raise NotImplementedError("tasks of several rounds are not supported by tinygptv")

    def _answers(self, prompts: list[Prompt], length: int) -> list[str]:
        generation = Generation(max_new_tokens=length)
        return list(answers(self._model, self._processor, prompts, generation, batch_size=self._batch_size))

    def _prompt(self, request: Instance) -> Prompt:
        return Conversation(self._template).ask(request.args[0], self._images(request.args[2:]))

    def _images(self, args: Sequence[Any]) -> list[Image.Image]:
        """Return the images of a request, whose last arguments are a function, the document, the task and the split."""
        if not args:  # only text
            return []
        to_visual, document, task, split = args
        found = to_visual(self.task_dict[task][split][document]) or []
        odd = next((each for each in found if not isinstance(each, Image.Image)), None)
        if odd is not None:
            raise ConfigError(f"task {task}: {type(odd).__name__} is not an image, and tinygptv takes nothing else")
        return list(found)

    def _continuation(self, request: Instance) -> str:
        words = request.args[1]
        if callable(words):
            _, document, task, split = request.args[2:]
            words = words(self.task_dict[task][split][document])
        return str(words).lstrip(" ")

    def _bar(self, total: int) -> tqdm:
        return tqdm(total=total, desc=NAME, unit="request", disable=None if self.rank == 0 else True)


def _length(options: dict[str, Any]) -> int:
    """Return the maximum number of new tokens."""
    if options.get("do_sample") or options.get("num_beams") not in (None, 1):
        raise ConfigError("tinygptv answers greedily in lmms-eval: --gen_kwargs do_sample=False,num_beams=1")
    return int(options.get("max_new_tokens") or _DEFAULT_TOKENS)


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """Return the answer before the first of the strings `until`."""
    for end in [until] if isinstance(until, str) else until or ():
        text = text.partition(end)[0] if end else text
    return text.strip()


def _parts(items: list, size: int) -> Iterator[list]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
