"""Texts that the dense model writes itself: kept, read back, gone on with, and thrown away where they are loops."""

import copy
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

import tools.workbench.written
from tests.benches import ignore, open_bench
from tests.team import gather_teams
from tests.tiny import make_tiny_model, make_tiny_tokenizer, tiny_settings
from tools.base.errors import BrokenBaseline, UserError
from tools.base.progress import Stopped, name_step, stop_at
from tools.models.sampling import draw_rows
from tools.texts.windows import Windows
from tools.workbench.open import close_workbench
from tools.workbench.store import ArtifactStore, Index
from tools.workbench.written import BATCH, Author

ALL = dict.fromkeys(("calibration", "validation", "test"), "self")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int, int, int]]:
    """(beginning, rows, tokens, seed) of every batch that is really drawn."""
    calls: list[tuple[list[int], int, int, int]] = []

    def count(model: Any, begin: list[int], rows: int, new: int, seed: int, **options: Any) -> Any:
        calls.append((begin, rows, new, seed))
        return draw_rows(model, begin, rows, new, seed, **options)

    monkeypatch.setattr(tools.workbench.written, "draw_rows", count)
    return calls


@pytest.fixture
def author(tmp_path: Path) -> Author:
    """The tiny Llama."""
    return make_author(tmp_path)


def make_author(directory: Path, tokenizer: Any = None, **changes: Any) -> Author:
    index = Index(ArtifactStore(directory / "artifacts"))
    settings = tiny_settings("any", **changes)
    return Author(make_tiny_model("llama"), tokenizer or make_tiny_tokenizer(), settings, index, ignore)


def same(first: Windows, second: Windows) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


def test_every_split_is_written_once_and_then_read(
    tiny_llama: Path, tmp_path: Path, drawn: list[Any], workbench_closed: None
) -> None:
    settings = tiny_settings(tiny_llama, **ALL)
    written = open_bench(settings, tmp_path / "run").windows
    assert [tuple(text.shape) for text in written[:3]] == [(4, 64), (3, 64), (2, 64)]
    assert {begin[0] for begin, *_ in drawn} == {0} and len({seed for *_, seed in drawn}) == len(drawn) >= 3
    assert [(rows, new) for _, rows, new, _ in drawn[:1]] == [(4, 64)]
    close_workbench()
    count = len(drawn)
    assert same(open_bench(settings, tmp_path / "run").windows, written) and len(drawn) == count


def test_windows_begin_as_those_of_other_texts_do(
    beginning_llama: Path, tmp_path: Path, workbench_closed: None
) -> None:
    settings = tiny_settings(beginning_llama, calibration="self")
    bench = open_bench(settings, tmp_path / "auto")
    begun, bos = bench.windows, bench.tokenizer.bos_token_id
    assert begun.lead == 1 and set(begun.calibration[:, 0].tolist()) == {bos}
    never = open_bench(settings.model_copy(update={"bos": "never"}), tmp_path / "never").windows
    assert torch.equal(never.calibration, begun.calibration[:, 1:])


def test_stopped_in_the_middle_and_gone_on_with(
    tiny_llama: Path, tmp_path: Path, drawn: list[Any], workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools.workbench.written, "BATCH", 2)
    settings, event = tiny_settings(tiny_llama, calibration="self", calibration_windows=6), Event()
    expected = open_bench(settings, tmp_path / "expected").windows
    whole = list(drawn)
    assert len(whole) == 3
    close_workbench()
    drawn.clear()

    def stop(label: str, done: int, total: int) -> None:
        if name_step(label) == "write calibration" and done > 3 * 64:
            event.set()

    with stop_at(event), pytest.raises(Stopped):
        Author(
            make_tiny_model("llama"),
            make_tiny_tokenizer(),
            settings,
            Index(ArtifactStore(tmp_path / "run" / "artifacts")),
            stop,
        )("calibration", [], 6 * 64)
    assert drawn == whole[:2]
    assert same(open_bench(settings, tmp_path / "run").windows, expected)
    assert drawn == [*whole[:2], *whole[1:]], "only the batch that was under way was begun anew"


def test_loops_are_thrown_away_and_others_drawn(author: Author, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def loop_first(model: Any, begin: list[int], rows: int, new: int, seed: int, **options: Any) -> list[list[int]]:
        documents = draw_rows(model, begin, rows, new, seed, **options)
        seeds.append(seed)
        return [[9] * new, *documents[1:]] if len(seeds) == 1 else documents

    monkeypatch.setattr(tools.workbench.written, "draw_rows", loop_first)
    ids = author("calibration", [], 4 * 64)
    assert len(seeds) == len(set(seeds)) >= 2 and len(ids) >= 4 * 64
    assert [9] * 8 not in [ids[i : i + 8] for i in range(len(ids))]


def test_a_text_of_loops_is_refused(author: Author, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tools.workbench.written, "draw_rows", lambda model, begin, rows, new, seed, **_: [[7, 8] * (new // 2)] * rows
    )
    with pytest.raises(UserError) as refusal:
        author("test", [], 4 * 64)
    assert str(refusal.value) == (
        f"the test text that the model wrote itself ('pydoc') came out degenerate: {BATCH} of {BATCH} documents repeat "
        "themselves or one another; use another source of text, such as hub:, file: or pydoc, or other prompts"
    )


def test_too_little_memory_is_one_line(author: Author, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise MemoryError("no more")

    monkeypatch.setattr(tools.workbench.written, "draw_rows", fail)
    with pytest.raises(BrokenBaseline, match=r"^writing test text: out of memory \(no more\); free some and go on, or"):
        author("test", [], 64)


def test_a_text_begins_with_its_prompt_and_prompts_take_turns(author: Author, drawn: list[Any]) -> None:
    tokenizer, prompts = make_tiny_tokenizer(), ["class A:", "The end"]
    first, second = (tokenizer(prompt)["input_ids"] for prompt in prompts)
    gap = tokenizer("a\n\n")["input_ids"][1:]
    ids = author("calibration", prompts, 4 * 64)
    assert [(begin, rows, new) for begin, rows, new, _ in drawn[:2]] == [(first, 2, 64), (second, 2, 64)]
    assert drawn[0][3] != drawn[1][3]
    assert ids[: len(first)] == first
    at = [i for i in range(len(ids)) if ids[i : i + len(gap) + len(second)] == [*gap, *second]]
    assert at, "behind an empty line the other prompt's document follows"


def test_chat_models_are_asked_through_their_template(tmp_path: Path, drawn: list[Any]) -> None:
    tokenizer = copy.deepcopy(make_tiny_tokenizer())
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<answer>{% endif %}"
    )
    ids = make_author(tmp_path, tokenizer)("calibration", ["Why?"], 64)
    assert tokenizer.decode(drawn[0][0]) == "<user>Why?<answer>"
    assert ids[:8] != drawn[0][0][:8], "what was asked is no part of the text"
    tokenizer.chat_template = tokenizer.chat_template.replace("answer", "reply")
    drawn.clear()
    assert make_author(tmp_path, tokenizer)("calibration", ["Why?"], 64) == ids and drawn == []
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(UserError, match="the model's chat template failed on a prompt: no users here"):
        make_author(tmp_path, tokenizer)("calibration", ["How?"], 64)


def test_documents_fit_the_models_positions(tmp_path: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.workbench.written.count_positions", lambda _model: 256)
    ids = make_author(tmp_path, window=512)("calibration", [], 512)
    assert len(ids) >= 512 and {(rows, new) for _, rows, new, _ in drawn[:1]} == {(1, 255)}
    with pytest.raises(UserError, match="leaves nothing of the model's 256 positions to write in; give a shorter one"):
        make_author(tmp_path, window=512)("calibration", ["import " * 300], 512)


def test_workers_see_the_windows_that_were_written(
    tiny_llama: Path, tmp_path: Path, drawn: list[Any], workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    teams = gather_teams(monkeypatch)
    bench = open_bench(tiny_settings(tiny_llama, **ALL, workers="2"), tmp_path / "run")
    assert all(same(worker.texts.windows, bench.windows) for worker in teams[0].workers)
    assert {seed for *_, seed in drawn} and len({seed for *_, seed in drawn}) == len(drawn), "they write nothing anew"
