"""Prompts that become files, and answers that come as files."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

from graph.config import RunConfig
from graph.llm.ask import ask
from graph.llm.exchange import find_answer, write_conversation, write_prompt
from graph.llm.ladder import AgentError
from graph.llm.models import check_model, open_model
from graph.planning.plan import Plan
from tests.graph.llm.asking import PLAN, QUESTION
from tools.base.errors import UserError
from tools.base.progress import Stopped, stop_at


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory where somebody answers every prompt: first with what is no plan, then with a plan."""
    done, place = threading.Event(), tmp_path / "exchange"

    def answer() -> None:
        while not done.wait(0.02):
            for prompt in sorted(place.glob("*.prompt.md")):
                to = prompt.with_name(prompt.name.replace(".prompt.md", ".answer.txt"))
                if not to.exists():
                    again = "That answer cannot be used" in prompt.read_text()
                    aside = place / "being-written"
                    aside.write_text(f"Here it is: {PLAN.model_dump_json()}" if again else "I think 45 %")
                    aside.rename(to)

    thread = threading.Thread(target=answer)
    thread.start()
    yield place
    done.set()
    thread.join()


def test_prompts_become_files_and_answers_are_read_from_files(place: Path) -> None:
    told: list[tuple[str, int, int]] = []
    model = open_model(f"exchange:{place}", RunConfig(), lambda *step: told.append(step))
    assert ask(model, Plan, QUESTION) == PLAN
    prompts = sorted(path.name for path in place.glob("*.prompt.md"))
    assert [name[:4] for name in prompts] == ["001-", "002-"]
    told_where = f"(Answer in {prompts[0].replace('.prompt.md', '.answer.txt')}, written aside and renamed.)"
    assert (place / prompts[0]).read_text() == f"=== user ===\n\nPlan, as JSON.\n\n{told_where}\n"
    second = (place / prompts[1]).read_text()
    assert second.startswith("=== user ===\n\nPlan, as JSON.\n\n=== assistant ===\n\nI think 45 %\n\n=== user ===\n\n")
    answer = place / prompts[0].replace(".prompt.md", ".answer.txt")
    assert told[:2] == [(f"wait for {answer}", 0, 1), (f"wait for {answer}", 1, 1)] and len(told) == 4
    assert ask(model, Plan, QUESTION) == PLAN, "the same prompts have the same answers"
    assert sorted(path.name for path in place.glob("*.prompt.md")) == prompts


def test_a_conversation_says_whose_each_message_is() -> None:
    said = [SystemMessage("You plan."), HumanMessage("Plan."), AIMessage("45 %"), HumanMessage("No.")]
    assert write_conversation(said) == (
        "=== system ===\n\nYou plan.\n\n=== user ===\n\nPlan.\n\n=== assistant ===\n\n45 %\n\n=== user ===\n\nNo.\n"
    )


def test_numbers_go_on_behind_the_last(tmp_path: Path) -> None:
    (tmp_path / "007-abc.prompt.md").write_text("x")
    (tmp_path / "notes.txt").write_text("x")
    assert write_prompt(tmp_path, "one").name.startswith("008-")
    assert write_prompt(tmp_path, "two").name.startswith("009-")
    prompt = write_prompt(tmp_path, "one")
    assert prompt.name.startswith("008-")
    last = f"(Answer in {prompt.name.replace('prompt.md', 'answer.txt')}, written aside and renamed.)"
    assert prompt.read_text() == f"one\n{last}\n", "who sees nothing but the file knows where the answer goes"


def test_an_answer_to_the_same_prompt_by_another_number_is_found(tmp_path: Path) -> None:
    """As where the files of two machines were put together, on which the prompt had another number."""
    prompt = write_prompt(tmp_path, "one")
    mark = prompt.name.removesuffix(".prompt.md").partition("-")[2]
    assert find_answer(prompt) is None
    (tmp_path / f"000-{mark}.prompt.md").write_bytes(prompt.read_bytes())
    assert write_prompt(tmp_path, "one").name == f"000-{mark}.prompt.md"
    (tmp_path / f"003-{mark}.answer.txt").write_text("x")
    assert find_answer(prompt) == find_answer(tmp_path / f"000-{mark}.prompt.md") == tmp_path / f"003-{mark}.answer.txt"


def test_who_waits_for_an_answer_can_be_stopped(tmp_path: Path) -> None:
    asked = threading.Event()
    asked.set()
    with stop_at(asked), pytest.raises(Stopped):
        ask(open_model(f"exchange:{tmp_path}", RunConfig()), Plan, QUESTION)
    assert len(list(tmp_path.glob("*.prompt.md"))) == 1


def test_a_directory_that_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^exchange:.*/file/x cannot be written: Not a directory$"):
        check_model(f"exchange:{tmp_path}/file/x")
    model = open_model(f"exchange:{tmp_path}/gone", RunConfig())
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match=r"/gone cannot be written: No such file or directory$"):
        ask(model, Plan, QUESTION)


def test_who_gave_no_answer_of_use_is_told_which_to_delete(tmp_path: Path) -> None:
    """Answers that are there are read again, so that going on alone would end the same way."""

    def answer() -> None:
        while not answered.is_set():
            for prompt in tmp_path.glob("*.prompt.md"):
                prompt.with_name(prompt.name.replace(".prompt.md", ".answer.txt")).write_text("hello there")
            answered.wait(0.02)

    answered = threading.Event()
    helper = threading.Thread(target=answer)
    helper.start()
    try:
        with pytest.raises(AgentError, match=r" gave no usable Plan in \d answers; the last one: ") as caught:
            ask(open_model(f"exchange:{tmp_path}", RunConfig()), Plan, QUESTION)
    finally:
        answered.set()
        helper.join()
    last = max(tmp_path.glob("*.answer.txt"))
    assert str(caught.value).endswith(f"; delete {last} to answer its prompt anew, or those before it, too")
