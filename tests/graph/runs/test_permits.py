"""What a run on a server may name, and what only a person may."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from langgraph.runtime import Runtime

from graph import studio
from graph.config import RunConfig, check_config, read_prompt
from graph.runs.permits import check_permitted
from graph.runs.steps import step, step_of_server
from graph.state import State
from tools.base.errors import UserError
from tools.base.options import CONFIGS, read_yaml
from tools.results.trial import Trial

EVIL = "openai:x@http://evil.example/v1"
FAR = "outside of the runs directory and the present one"
NO_ADDRESS = "an address that no config names"
CODE = "trust_remote_code is refused on a server: what runs code of a hub is started with python -m graph.run"
FACTS = "file:/etc/facts.jsonl"


def explain(field: str, value: str, what: str) -> str:
    return (
        f"{field} {value!r} is refused on a server: it is {what}; name it in a file of configs/ or in "
        f"BILLHOOK_{field.upper()}, or start the run with python -m graph.run"
    )


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that a server was started in; its runs are beside it, and something else is as well."""
    for part in ("home/data", "runs/old/model", "elsewhere/model"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "home" / "way-out").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("BILLHOOK_RUNS_DIR", str(tmp_path / "runs"))
    return tmp_path


@pytest.mark.parametrize(
    "values",
    [
        {},
        *({"model": model} for model in ("Qwen/Qwen3-4B", "gpt2", "package:anything", "data", "./data", "gone.gguf")),
        {"model": "../runs/old/model"},
        {"calibration": "hub:Salesforce/wikitext/wikitext-2-raw-v1:train", "validation": "pydoc", "test": "file:t.txt"},
        {"text": {"code": "file:data/code.txt", "own": "self", "prose": "hub:a/b:train"}},
        {"calibration": "hub:data:train", "questions": "file:facts.jsonl", "mmlu": "file:data", "freebaseqa": ""},
        *(
            {"planner": agent}
            for agent in ("openai:gpt-5.1", "anthropic:claude-x", "local:Qwen/Qwen3-4B", "local:data", "exchange:asked")
        ),
        *({"workers": workers} for workers in ("2", "auto")),
        {"planner_prompt": "Plan. {tools}{schema}", "reflector_prompt": "Reflect. {schema}"},
    ],
)
def test_what_a_run_on_a_server_may_name(values: dict[str, Any]) -> None:
    check_permitted(State(config=RunConfig(**values)))


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        *(("model", path, FAR) for path in ("/", "~", "../elsewhere/model", "way-out/model", "/etc/x.gguf")),
        *((text, "file:/etc/passwd", FAR) for text in ("calibration", "validation", "test", "freebaseqa", "mmlu")),
        ("questions", FACTS, FAR),
        ("calibration", "csv:/etc/passwd", FAR),  # of a kind that there is not yet
        ("calibration", "hub:../elsewhere:train", FAR),
        ("test", "file:../runs/../elsewhere/t.txt", FAR),
        *((agent, f"exchange:{path}", FAR) for agent in ("planner", "reflector") for path in ("/etc", "way-out/x")),
        *((agent, EVIL, NO_ADDRESS) for agent in ("planner", "reflector")),
        ("planner", "openai:x@http://127.0.0.1:11434/v1", NO_ADDRESS),
        ("planner", "openai:x@http://169.254.169.254/latest", NO_ADDRESS),
        ("planner", "other:http://evil.example", NO_ADDRESS),
        *(("reflector", f"{provider}:/etc/model", FAR) for provider in ("local", "huggingface")),
        ("workers", "ray://evil.example:10001", NO_ADDRESS),
    ],
)
def test_what_only_a_person_may_name(
    field: str, value: str, what: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = State(config=RunConfig(**{field: value}))
    with pytest.raises(UserError) as refusal:
        check_permitted(state)
    assert str(refusal.value) == explain(field, value, what)
    with monkeypatch.context() as named:
        named.setenv(f"BILLHOOK_{field.upper()}", value)
        check_permitted(state)
    with pytest.raises(UserError):
        check_permitted(state)
    (home / "runs" / "old" / "config.yaml").write_text(json.dumps({field: value}))
    check_permitted(state)


def test_sources_of_named_texts_are_looked_at_as_any_other(home: Path) -> None:
    state = State(config=RunConfig(text={"prose": "pydoc", "code": "file:/etc/passwd"}))
    with pytest.raises(UserError) as refusal:
        check_permitted(state)
    assert str(refusal.value) == explain("text", "file:/etc/passwd", FAR)
    (home / "runs" / "old" / "config.yaml").write_text(json.dumps({"text": {"other": "file:/etc/passwd"}}))
    check_permitted(state)


def test_what_is_no_path_is_refused_too() -> None:
    with pytest.raises(UserError, match=FAR):
        check_permitted(State(config=RunConfig(model="a\0b")))


def test_an_address_that_is_named_may_have_any_model_and_no_other_address_has(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BILLHOOK_REFLECTOR", "openai:mine@http://127.0.0.1:8080/v1")
    check_permitted(State(config=RunConfig(planner="openai:other@http://127.0.0.1:8080/v1")))
    for near in ("http://127.0.0.1:8080", "http://127.0.0.1:8081/v1", "https://127.0.0.1:8080/v1"):
        with pytest.raises(UserError, match=NO_ADDRESS):
            check_permitted(State(config=RunConfig(planner=f"openai:mine@{near}")))
    with pytest.raises(UserError, match=NO_ADDRESS):
        check_permitted(State(config=RunConfig(planner="other:mine@http://127.0.0.1:8080/v1")))


def test_code_of_a_hub_is_never_run_even_where_a_config_says_so(home: Path) -> None:
    (home / "runs" / "old" / "config.yaml").write_text("trust_remote_code: true\n")
    with pytest.raises(UserError) as refusal:
        check_permitted(State(config=RunConfig(trust_remote_code=True)))
    assert str(refusal.value) == CODE


@pytest.mark.parametrize("field", ["planner_prompt", "reflector_prompt"])
def test_a_file_is_no_prompt_whether_it_is_there_or_not(field: str, home: Path) -> None:
    (home / "home" / "mine.md").write_text("{tools}{schema}")
    for name in ("mine.md", "none.md", "/etc/passwd"):
        config = RunConfig(**{field: f"file:{name}"})
        assert getattr(config, field) == f"file:{name}", "it was not read"
        with pytest.raises(UserError) as refusal:
            check_permitted(State(config=config))
        assert (
            str(refusal.value) == f"{field}: files are read as prompts at the command line alone; give the text itself"
        )
    assert getattr(check_config({field: "file:mine.md"}), field) == "{tools}{schema}", "a person's is read"


@pytest.mark.parametrize("mark", ["../../x", "/etc/passwd", "a/b", "."])
@pytest.mark.parametrize("field", ["profile", "order", "current", "accepted", "trials"])
def test_ids_are_no_paths(field: str, mark: str) -> None:
    trial = Trial(
        iteration=1, checkpoint=mark, sparsity=0, perplexity=1, kl=0, predicted_kl=0, verdict="accept"
    ).model_dump()
    with pytest.raises(UserError) as refusal:
        check_permitted(State.model_validate({field: [trial] if field == "trials" else mark}))
    assert str(refusal.value) == f"the state names {mark!r}, which is the id of no file of a run"


def test_every_node_of_a_server_is_checked_and_none_of_the_command_line() -> None:
    done: list[str] = []

    def plan(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
        done.append(state.config.planner)
        return {}

    evil = RunConfig(planner=EVIL)
    for state, context in (
        (State(), evil),
        (State(run="x", profile="p", config=evil), RunConfig()),
        (State(run="x", profile="p"), RunConfig(workers="ray://evil.example:10001")),
        (State(run="x", profile="p", config=RunConfig(workers="ray://evil.example:10001")), RunConfig(workers="")),
    ):
        with pytest.raises(UserError, match=NO_ADDRESS):
            asyncio.run(step_of_server(plan)(state, Runtime(context=context)))
    assert done == []
    step(plan)(State(), Runtime(context=evil))
    assert done == [EVIL]


def test_configs_are_handed_to_studio_with_the_text_of_their_prompts(home: Path) -> None:
    (home / "home" / "mine.md").write_text("Mine: {tools}{schema}")
    file = home / "mine.yaml"
    file.write_text(
        f"planner_prompt: file:mine.md\nreflector_prompt: {json.dumps(read_prompt('reflector'))}\ntau: 0.3\n"
    )
    assert studio.read_context(file) == {"planner_prompt": "Mine: {tools}{schema}", "reflector_prompt": "", "tau": 0.3}
    for shipped in CONFIGS.glob("*.yaml"):
        assert studio.read_context(shipped) == read_yaml(shipped)
        check_permitted(State(config=RunConfig(**read_yaml(shipped))))
