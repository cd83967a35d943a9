"""The command `answer`: any source of images, any number of ranks, a kill in between, and the same file of answers."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from helpers import forked, tiny
from helpers.tar_server import TarServer
from helpers.verbs import call

from tinygptv_ds.apps import answer as verb
from tinygptv_ds.apps.question_file import QuestionRecord
from tinygptv_ds.cli import run_command
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.generate.conversation import Conversation
from tinygptv_ds.generate.generate import answers
from tinygptv_ds.generate.load import LoadedModel
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.processing.templates import choose_template

OPTIONS = ("--dtype", "fp32", "--max-new-tokens", "5")


@pytest.fixture
def folder(tmp_path: Path, shards: dict[str, Path]) -> Path:
    """Images, a shard of pairs, and 7 questions of every kind."""
    (tmp_path / "images").mkdir()
    for number, image in enumerate(tiny.encoded_images(3)):
        (tmp_path / f"images/{number}.png").write_bytes(image)
    (tmp_path / "pairs").symlink_to(shards["pair"])
    write(
        tmp_path / "questions.jsonl",
        [
            {"question": "what is it ?", "image": "images/0.png", "id": "é"},
            {"question": "the bus"},
            {"question": "which ?", "images": ["images/1.png", "images/2.png"], "nested": {"a": [1]}},
            {"question": "left", "image": {"shard": "pairs/00000.tar", "key": "000003"}},
            {"question": "and ?", "image": "images/../images/2.png", "history": [["what ?", "red"]]},
            {"question": "what colour", "image": str(tmp_path / "images/0.png"), "images_of": None},
            {"question": "on the left " * 5, "image": None},
        ],
    )
    return tmp_path


def write(path: Path, records: Iterable[dict]) -> None:
    path.write_text("\n\n".join(json.dumps(record) for record in records))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(exported: Path, folder: Path, *options: object, out: str = "answers.jsonl") -> list[dict]:
    call(verb, exported, "--input", folder / "questions.jsonl", "--output", folder / out, *OPTIONS, *options)
    return read(folder / out)


def test_every_source_of_images(exported: Path, loaded: LoadedModel, folder: Path, shards: dict[str, Path]) -> None:
    """Fields pass through, in the order of the questions; the answers are those of the prompts asked one by one."""
    given = answer(exported, folder, "--batch-size", "3")
    asked = read_questions(folder)
    assert [{k: v for k, v in record.items() if k != "answer"} for record in given] == asked
    pair = list(tiny.samples("pair", 4)[3].images)
    files = [(folder / f"images/{number}.png").read_bytes() for number in range(3)]
    images = [files[:1], [], files[1:], pair, files[2:], files[:1], []]
    model, processor = loaded
    questions = []
    for record, seen in zip(asked, images, strict=True):
        talk = Conversation(choose_template(None, processor.prompt_template, "###"))
        for number, (question, said) in enumerate(record.get("history", [])):
            talk.ask(question, seen if number == 0 else [])
            talk.add_answer(said)
        questions.append(talk.ask(record["question"], [] if record.get("history") else seen))
    expected = list(answers(model, processor, questions, Generation(max_new_tokens=5), batch_size=1))
    assert [record["answer"] for record in given] == expected
    assert not (folder / "answers.jsonl.parts").exists()


def read_questions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines() if line]


def test_images_from_the_web(exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed fetch is the error of its line alone; with --strict it ends the job, which can be resumed."""
    with TarServer() as server:
        server.files["0.png"] = (folder / "images/0.png").read_bytes()
        urls = [f"{server.url}/0.png", f"{server.url}/none.png"]
        records = [{"question": "what is it ?", "image": image} for image in ("images/0.png", *urls)]
        write(folder / "questions.jsonl", records)
        first, fetched, missing = answer(exported, folder, "--allow-private")
        assert first["answer"] == fetched["answer"]
        assert missing == records[2] | {"error": f"{urls[1]}: the server answers 404 Not Found"}
        refused = answer(exported, folder, out="refused.jsonl")
        assert all("not on the public internet" in record["error"] for record in refused[1:])
        with pytest.raises(DataError, match=r"questions.jsonl:5: .*none.png: the server answers 404"):
            answer(exported, folder, "--allow-private", "--strict", out="strict.jsonl")
        server.files["none.png"] = server.files["0.png"]
        assert [*map(len, answer(exported, folder, "--allow-private", "--strict", out="strict.jsonl"))] == [3, 3, 3]


def test_images_that_are_none(exported: Path, folder: Path) -> None:
    (folder / "images/1.png").write_bytes(b"no image")
    given = answer(exported, folder)
    assert "image 1 of 2: the image cannot be decoded" in given[2].pop("error")
    assert "answer" not in given[2]
    assert all("answer" in record for number, record in enumerate(given) if number != 2)


BAD = {
    '{"question": ': "not JSON",
    "[1]": "a JSON object is expected, not a list",
    '{"image": "images/0.png"}': "'question' must be a text",
    '{"question": " "}': "'question' must be a text",
    '{"question": "a", "answer": "b"}': "has a field 'answer'",
    '{"question": "a", "error": null}': "has a field 'error'",
    '{"question": "a", "image": "x", "images": []}': "both 'image' and 'images'",
    '{"question": "a", "image": "images/9.png"}': "no image",
    '{"question": "a", "image": "../x.png"}': "is outside",
    '{"question": "a", "image": "/etc/hostname"}': "is outside",
    '{"question": "a", "image": "images"}': "no image",
    '{"question": "a", "image": 3}': "must be a path, a URL, or",
    '{"question": "a", "image": "file:///etc/passwd"}': "begins with http:// or https://",
    '{"question": "a", "images": "x"}': "'images' must be a list",
    '{"question": "a", "image": {"shard": "pairs/00000.tar"}}': "is {'shard': 'PATH.tar', 'key': 'KEY'}",
    '{"question": "a", "image": {"shard": "pairs/00000.tar", "key": "x"}}': "holds no sample 'x'",
    '{"question": "a", "image": {"shard": "pairs/9.tar", "key": "x"}}': "no shard",
    '{"question": "a", "image": {"shard": "images/0.png", "key": "x"}}': "no uncompressed tar",
    '{"question": "a", "history": [["b"]]}': "it holds ['b']",
    '{"question": "\\ud800"}': "half a character",
}


def test_lines_are_checked_before_the_model_is_loaded(
    exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is refused if no question, or with --strict any one, cannot be answered; file and line are listed."""
    path = folder / "questions.jsonl"
    monkeypatch.setattr(verb, "load_from", lambda *_, **__: pytest.fail("loaded"))
    for line, why in BAD.items():
        path.write_text(line)
        with pytest.raises(DataError) as caught:
            answer(exported, folder)
        assert "1 of 1 lines" in str(caught.value) and why in str(caught.value) and f"{path}:1: " in str(caught.value)
    path.write_text('{"question": "a"}\n' + "[]\n" * 7)
    with pytest.raises(DataError, match=r"7 of 8 lines cannot be answered:(?s:.*)jsonl:2: (?s:.*)and 2 more"):
        answer(exported, folder, "--strict")
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no question"):
        answer(exported, folder)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        answer(exported, folder)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        answer(exported, folder)
    (folder / "answers.jsonl").touch()
    with pytest.raises(ConfigError, match="exists already and is complete"):
        answer(exported, folder)


def test_bad_lines_among_good_ones(exported: Path, folder: Path) -> None:
    (folder / "questions.jsonl").write_text('{"question": "the bus", "id": 1}\n' + "\n".join(BAD))
    given = answer(exported, folder, "--answer-field", "said")
    assert given[0].keys() == {"question", "id", "said"}
    assert [why in record["error"] for why, record in zip(BAD.values(), given[1:], strict=True) if "answer" not in why]
    assert given[-1]["question"] == "\ud800"
    assert given[5] == {"question": "a", "answer": "b", "said": given[5]["said"]}  # no bad line with that option


def test_another_job_is_refused(exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(verb, "load_from", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answer(exported, folder)
    with pytest.raises(ConfigError, match=r"differs in --template, generation; repeat"):
        answer(exported, folder, "--template", "C", "--seed", "1")
    assert len(answer(exported, folder, "--batch-size", "1")) == 7


def test_ranks_and_kills(exported: Path, folder: Path) -> None:
    """Two ranks are killed while they answer and one journal is torn; three ranks resume, and none answers twice."""
    records = read_questions(folder) * 4
    write(folder / "questions.jsonl", [record | {"number": number} for number, record in enumerate(records)])
    expected = answer(exported, folder)
    argv = [exported, "--input", folder / "questions.jsonl", "--output", folder / "ranks.jsonl", *OPTIONS]
    parts = folder / "ranks.jsonl.parts"
    ranks = start(2, argv, folder / "output.txt", slow)
    while sum(file.read_bytes().count(b"\n") for file in parts.glob("rank-*")) < 6:
        assert all(rank.is_alive() for rank in ranks), (folder / "output.txt").read_text()
        time.sleep(0.01)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
        rank.join()
    assert not (folder / "ranks.jsonl").exists()
    torn = parts / "rank-00001.jsonl"
    torn.write_bytes(torn.read_bytes() + b'{"index": 1, "rec')
    kept = {json.loads(line)["index"] for file in parts.glob("rank-*") for line in file.open() if line.endswith("}\n")}
    for rank in (ranks := start(3, argv, folder / "output.txt", note_asked)):
        rank.join()
    output = (folder / "output.txt").read_text()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0], output
    assert read(folder / "ranks.jsonl") == expected
    asked = [int(line.split()[1]) for line in output.splitlines() if line.startswith("asked ")]
    assert sorted(asked) == sorted(set(range(28)) - kept)
    assert len(kept) >= 6 and not parts.exists()


def slow() -> None:
    """Prepare each question slowly."""
    prepare = verb._prepare
    verb._prepare = lambda *given: (time.sleep(0.1), prepare(*given))[1]


def note_asked() -> None:
    prepare = verb._prepare

    def noted(question: QuestionRecord, work: verb.BatchAnswering) -> verb.PreparedQuestion:
        print(f"asked {question.index}\n", end="", flush=True)
        return prepare(question, work)

    verb._prepare = noted


def start(world: int, argv: list, output: Path, fault: Callable[[], None]) -> list[BaseProcess]:
    """Start ranks of the command, forked from a process that has imported everything."""
    context = forked.fork_context()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_rank, args=(rank, world, port, output, argv, fault)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def _rank(rank: int, world: int, port: int, output: Path, argv: list, fault: Callable[[], None]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in names.items()}, MASTER_ADDR="127.0.0.1")
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    fault()
    run_command(lambda: call(verb, *argv, "--batch-size", "1"))
