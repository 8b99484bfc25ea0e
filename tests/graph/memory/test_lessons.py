"""Lessons in the store: kept once, merged when read, found again, and forgotten on request."""

from pathlib import Path
from typing import Any

import pytest
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore

from graph.config import RunConfig
from graph.goals.schema import Aim, Brief, NewText, follow_brief, follow_new_texts
from graph.memory import lessons as memory
from graph.memory.__main__ import main
from graph.memory.experience import write_tried
from graph.memory.lessons import family, namespace, read_lessons, search_lessons, write_lesson
from graph.memory.notes import write_note
from graph.persistence import open_store
from graph.reflecting.schema import Lesson, Note, Tried
from tests.situations import make_lesson

CONFIG = RunConfig(model="Qwen/Qwen3-4B")
OTHER_CONFIG = RunConfig(model="Qwen/Qwen3-4B", target_sparsity=0.3)
GROUP = "blocks 4-5 · mlp.down_proj"


def learn(run: str, iteration: int = 1, factor: float = 1.5, selector: str = GROUP, text: str = "") -> Lesson:
    update = {"run": run, "iteration": iteration, "text": text or f"learnt in {run}"}
    return make_lesson(selector, factor).model_copy(update=update)


@pytest.fixture
def store() -> BaseStore:
    return InMemoryStore()


def keys(store: BaseStore, config: RunConfig = CONFIG) -> list[str]:
    return sorted(item.key for item in store.search(namespace(config.model), limit=1000))


# Writing and reading


def test_writing_again_changes_nothing(store: BaseStore) -> None:
    for _ in range(2):
        write_lesson(store, CONFIG, learn("first", 1))
        write_lesson(store, CONFIG, learn("first", 1, selector="*.v_proj"), number=1)
        write_lesson(store, CONFIG, learn("first", 2))
    assert keys(store) == ["first/1/0", "first/1/1", "first/2/0"]
    lessons, runs = read_lessons(store, CONFIG, "second")
    assert [(lesson.selector, lesson.count) for lesson in lessons] == [("*.v_proj", 1), (GROUP, 2)]
    assert runs == 1


def test_observations_of_several_runs_are_one_lesson(store: BaseStore) -> None:
    for run, factor in (("first", 2.0), ("second", 1.0), ("third", 1.5)):
        write_lesson(store, OTHER_CONFIG, learn(run, factor=factor))
    lessons, runs = read_lessons(store, CONFIG, "third")
    assert [(x.count, x.factor, x.run, x.text) for x in lessons] == [(2, 1.4142, "second", "learnt in second")]
    assert runs == 2, "the run's own are not read back"
    assert lessons[0].model == ""


def test_lessons_of_this_very_config_are_marked_and_kept_apart(store: BaseStore) -> None:
    write_lesson(store, CONFIG, learn("same"))
    write_lesson(store, OTHER_CONFIG, learn("other"))
    lessons, runs = read_lessons(store, CONFIG, "new")
    assert {lesson.run: lesson.same_config for lesson in lessons} == {"same": True, "other": False}
    assert runs == 2


@pytest.mark.parametrize(
    ("change", "same"),
    [
        *(({"workers": "4", "worker_threads": 1}, True), ({"device": "cuda"}, True), ({"patience": 9}, True)),
        *(({"agent_timeout": 9.0, "agent_retries": 0}, True), ({"max_agent_tokens": 9, "max_agent_cost": 9.0}, True)),
        *(({"planner_price_input": 2.0, "approve": "plans", "max_iterations": 3}, True), ({"tasks": ["mmlu"]}, True)),
        *(
            ({"seed": 1}, False),
            ({"text_cut": 1}, False),
            ({"text_spread": 2}, False),
            ({"bos": "never"}, False),
            ({"calibration": "hub:x:train"}, False),
            ({"dtype": "bf16"}, False),
        ),
        *(({"target_sparsity": 0.5}, False), ({"tau": 0.2}, False), ({"planner": "openai:x"}, False)),
    ],
    ids=str,
)
def test_a_repeat_is_a_run_of_the_same_trials_wherever_and_however_long_it_works(
    store: BaseStore, change: dict[str, Any], same: bool
) -> None:
    write_lesson(store, CONFIG, learn("first"))
    (lesson,), _ = read_lessons(store, CONFIG.model_copy(update=change), "second")
    assert lesson.same_config is same


def test_a_run_with_a_goal_is_a_repeat_whatever_was_made_of_the_goal() -> None:
    config = RunConfig(goal="Code.", goal_tokens=9000, text={"code": "pydoc", "prose": "file:prose.txt"})
    new = [NewText(name="tales", prompts=["Once", "Twice", "Thrice"])]
    aims = [Aim(name="code", weight=3, max_rise=0.2), Aim(name="prose", weight=0), Aim(name="tales", weight=1)]
    followed = follow_brief(config, Brief(aims=aims, new_texts=new, min_answers=0.5))
    later = follow_new_texts(followed, [NewText(name="songs", prompts=["La", "Le", "Li"])])
    assert memory.fingerprint(config) == memory.fingerprint(followed) == memory.fingerprint(later)
    for other in ({"goal": "Prose."}, {"text": {"code": "pydoc"}}, {"seed": 1}):
        assert memory.fingerprint(config.model_copy(update=other)) != memory.fingerprint(config)


def test_what_the_fingerprint_leaves_out_are_fields_of_the_config() -> None:
    assert {*memory.IDLE} < set(RunConfig.model_fields)


def test_lessons_of_this_text_go_before_those_of_another(store: BaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LIMIT", 1)
    elsewhere = {"calibration": "hub:x:train", "pattern": "", "sparsity": 0.45}
    for iteration in range(3):
        write_lesson(store, OTHER_CONFIG, learn("often", iteration).model_copy(update=elsewhere))
    write_lesson(store, OTHER_CONFIG, learn("once").model_copy(update=elsewhere | {"calibration": "pydoc"}))
    assert [lesson.run for lesson in read_lessons(store, CONFIG, "new")[0]] == ["once"]
    far = CONFIG.model_copy(update={"calibration": "hub:x:train"})
    assert [lesson.run for lesson in read_lessons(store, far, "new")[0]] == ["often"]


def test_another_model_of_the_same_label_has_its_own_lessons(store: BaseStore) -> None:
    other = RunConfig(model="Qwen_Qwen3-4B")
    assert namespace(other.model) == namespace(CONFIG.model)
    write_lesson(store, other, learn("other"))
    assert read_lessons(store, CONFIG, "new") == ([], 0)


def test_a_lesson_that_was_contradicted_again_and_again_is_not_read(store: BaseStore) -> None:
    for iteration in range(8):
        write_lesson(store, OTHER_CONFIG, learn("first", iteration, factor=2.0 if iteration % 2 == 0 else 0.5))
    assert read_lessons(store, CONFIG, "new") == ([], 0)
    assert len(keys(store)) == 8, "without them the next observation would count as undisputed"


def test_mere_words_are_not_kept(store: BaseStore) -> None:
    write_lesson(store, CONFIG, learn("first").model_copy(update={"confidence": 0.0}))
    assert not keys(store)


def test_a_model_keeps_so_many_lessons_and_observations_of_most_evidence(
    store: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "KEPT", 3)
    monkeypatch.setattr(memory, "OBSERVATIONS", 4)
    for iteration in range(6):
        write_lesson(store, OTHER_CONFIG, learn("often", iteration))
    for block in range(5):
        write_lesson(store, OTHER_CONFIG, learn(f"once-{block}", selector=f"blocks {block}-{block}"))
    expected = [*(f"often/{iteration}/0" for iteration in (2, 3, 4, 5)), "once-3/1/0", "once-4/1/0"]
    assert keys(store) == sorted(expected)
    write_lesson(store, OTHER_CONFIG, learn("once-4", selector="blocks 4-4"))
    assert keys(store) == sorted(expected)


def test_a_new_run_starts_with_those_of_most_evidence(store: BaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LIMIT", 2)
    for run, selector in (("a", "blocks 0-0"), ("b", GROUP), ("c", GROUP), ("d", "blocks 1-1"), ("e", "blocks 1-1")):
        write_lesson(store, OTHER_CONFIG, learn(run, selector=selector))
    lessons, runs = read_lessons(store, CONFIG, "new")
    assert [lesson.selector for lesson in lessons] == [GROUP, "blocks 1-1"]
    assert runs == 4, "the runs that taught these"


# Searching


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Qwen/Qwen3-4B", "qwen"),
        ("Qwen/Qwen2.5-Coder-1.5B-Instruct", "qwen"),
        ("HuggingFaceTB/SmolLM2-135M", "smollm"),
        ("package:smollm2-135m-gguf", "smollm"),
        ("meta-llama/Llama-3.2-1B", "llama"),
        ("/models/Llama-3.2-1B/", "llama"),
        ("EleutherAI/gpt-neo-125m", "gpt-neo"),
        ("models/mine", "mine"),
        ("models/135M", ""),
        ("/home/me/runs/qwen-small/model", ""),
        ("runs\\small\\model\\", ""),
    ],
)
def test_the_family_is_the_name_up_to_its_first_digit(model: str, expected: str) -> None:
    assert family(model) == expected


def test_a_search_finds_this_model_and_its_relatives_by_words(store: BaseStore) -> None:
    write_lesson(store, OTHER_CONFIG, learn("own", selector="blocks 0-1 · self_attn.v_proj", text="values are dear"))
    write_lesson(store, OTHER_CONFIG, learn("own", 2, text="down projections are dear"))
    write_lesson(store, RunConfig(model="Qwen/Qwen3-8B"), learn("big", text="values of the large one"))
    write_lesson(store, RunConfig(model="gpt2"), learn("far", text="values of another family"))
    found = search_lessons(store, CONFIG, "v_proj: values?")
    assert [(lesson.text, lesson.model) for lesson in found] == [
        ("values are dear", ""),
        ("values of the large one", "Qwen/Qwen3-8B"),
    ]
    assert len(search_lessons(store, CONFIG, "")) == 3
    assert search_lessons(store, CONFIG, "nonsense") == []
    assert search_lessons(store, CONFIG.model_copy(update={"memory": False}), "values") == []


def test_models_of_no_family_are_no_relatives(store: BaseStore) -> None:
    write_lesson(store, RunConfig(model="models/135M"), learn("first"))
    assert search_lessons(store, RunConfig(model="models/360M"), "") == []
    assert len(search_lessons(store, RunConfig(model="models/135M"), "")) == 1


# The command


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BILLHOOK_RUNS_DIR", raising=False)
    monkeypatch.setenv("BILLHOOK_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("BILLHOOK_STATE", "")
    with open_store(tmp_path / "runs") as store:
        write_lesson(store, CONFIG, learn("first", text="dear\x1b[31m"))
        write_lesson(store, CONFIG, learn("second", factor=2.0))
        tried = Tried(run="third", iteration=2, levers="wanda: x", sparsity=0.5, pattern="", change=-0.1, error=0.01)
        write_tried(store, RunConfig(model="gpt2"), tried)
        note = Note(run="third", iteration=2, sparsity=0.5, pattern="", text="clip\x1b[31m less", trials=[1, 2])
        write_note(store, RunConfig(model="gpt2"), note)
        at = {"calibration": "pydoc", "pattern": "2:4", "sparsity": 0.5}
        write_lesson(store, RunConfig(model="gpt2"), learn("third", selector="*.c_attn").model_copy(update=at))
    return tmp_path / "runs"


def obey(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_list_counts_lessons_and_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "Qwen/Qwen3-4B: 1 lesson from 2 runs\ngpt2: 1 lesson, 1 trial, 1 note from 1 run\n"
    assert obey(capsys, "list") == (0, told, "")
    elsewhere = obey(capsys, "list", "--runs-dir", "elsewhere")
    assert elsewhere == (0, "no lessons in elsewhere\n", "")
    assert not Path("elsewhere").exists(), "looking makes nothing"


def test_a_model_is_shown_with_its_figures(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert obey(capsys, "show", "Qwen/Qwen3-4B") == (
        0,
        "Qwen/Qwen3-4B: 1 lesson from 2 runs\n"
        f"  {GROUP} ×1.73 with refit (2 observations, confidence 1.00): learnt in second\n",
        "",
    )
    assert obey(capsys, "show", "gpt2")[1].splitlines()[1:] == [
        "  *.c_attn ×1.50 with refit at 50.0% as 2:4 on pydoc (1 observation, confidence 1.00): learnt in third",
        *("  this model, 50%", "  wanda: x -10.0 +- 1.0 (1, 1)"),
        "  note of third, rounds 1, 2: clip less",
    ]


def test_forgetting_says_first_what_it_would_forget(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "1 observation about Qwen/Qwen3-4B from 1 run"
    one = ("forget", "Qwen/Qwen3-4B", "--run", "first")
    assert obey(capsys, *one) == (0, f"would forget {told}; add --yes to do it\n", "")
    assert obey(capsys, *one, "--yes") == (0, f"forgot {told}\n", "")
    assert obey(capsys, *one, "--yes") == (
        2,
        "",
        "error: no lessons of run 'first'; see python -m graph.memory list\n",
    )
    assert obey(capsys, "forget", "Qwen/Qwen3-4B", "--yes")[0] == 0
    assert obey(capsys, "list")[1] == "gpt2: 1 lesson, 1 trial, 1 note from 1 run\n"
    assert obey(capsys, "forget", "gpt2", "--yes")[1] == "forgot 3 observations about gpt2 from 1 run\n"
    assert obey(capsys, "list")[1].startswith("no lessons in ")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("show", "Qwen/Qwen3-8B"), "no lessons of model 'Qwen/Qwen3-8B'; did you mean Qwen/Qwen3-4B?"),
        (("forget", "bert"), "no lessons of model 'bert'; see python -m graph.memory list"),
        (("show", "gpt2", "--runs-dir", "elsewhere"), "there are no lessons in elsewhere"),
        (("forget", "Qwen/Qwen3-4B", "--run", "secnd"), "no lessons of run 'secnd'; did you mean second?"),
        (("sho",), "argument COMMAND: invalid choice: 'sho' (choose from list, show, forget)"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: tuple[str, ...], error: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = obey(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.replace("'list', 'show', 'forget'", "list, show, forget") == f"error: {error}\n"
