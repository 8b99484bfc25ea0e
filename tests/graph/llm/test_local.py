"""A model in this process: whatever it is, it answers with JSON that fits the schema, and says what it cost."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage
from pydantic import BaseModel, Field

from graph.config import RunConfig
from graph.llm import local
from graph.llm.ask import CallRecord, ask
from graph.llm.attempts import read_terms
from graph.llm.ladder import AgentError
from graph.llm.local import bound_schema, close_local
from graph.llm.models import check_model, open_model
from graph.planning.plan import Plan
from graph.reflecting.schema import Reflection
from tests.tiny import make_tiny_model, make_tiny_tokenizer, save_tiny_gguf
from tools.base.errors import UserError

QUESTION: list[AnyMessage] = [SystemMessage("You plan."), HumanMessage("Plan round 1.")]
PLAIN = "System: You plan.\n\nUser: Plan round 1.\n\nAssistant: "
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}<quiet>{% endif %}{% endif %}"
)
LIMITS = {"minimum": -1_000_000, "maximum": 1_000_000}
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE


class Everything(BaseModel):
    """All kinds of values, none with a bound of its own."""

    number: float
    whole: int
    text: str
    kind: Literal["one", "two"]
    flags: list[bool]
    parts: list["Part"]
    one_of: str | float | None


class Part(BaseModel):
    """A part."""

    name: str = Field(min_length=1, max_length=20)
    share: float = Field(gt=0, lt=1)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_local()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_model(directory: Path, seed: int = 0, context: int = 4096, template: str | None = None) -> str:
    """A tiny random Llama with its tokenizer; the string that stands for it."""
    model, tokenizer = make_tiny_model("llama", seed), make_tiny_tokenizer()
    model.config.max_position_embeddings = context
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return f"local:{directory}"


def open_tiny(spec: str, **changes: Any) -> Any:
    return open_model(spec, RunConfig.model_validate({"device": "cpu", **changes}))


def reply(model: Any, schema: type[BaseModel], messages: list[AnyMessage] = QUESTION) -> AIMessage:
    answer = model.bind(schema=schema.model_json_schema()).invoke(messages)
    assert isinstance(answer, AIMessage)
    return answer


# What it answers


@pytest.mark.parametrize("schema", [Everything, Reflection, Plan])
@pytest.mark.parametrize("seed", range(3))
def test_a_random_model_answers_with_what_fits(schema: type[BaseModel], seed: int, tmp_path: Path) -> None:
    answer = reply(open_tiny(save_model(tmp_path, seed)), schema)
    assert answer.response_metadata == {"finish_reason": "stop"}
    found = json.loads(answer.text)
    assert_bounded(found)
    assert found.keys() <= schema.model_fields.keys()
    if schema is Everything:
        Everything.model_validate(found)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_a_random_model_answers_with_what_fits_at_any_temperature(temperature: float, tmp_path: Path) -> None:
    model = open_tiny(save_model(tmp_path), agent_temperature=temperature)
    found = json.loads(reply(model, Everything).text)
    assert_bounded(found)
    Everything.model_validate(found)


def assert_bounded(found: Any) -> None:
    if isinstance(found, dict | list):
        assert isinstance(found, dict) or len(found) <= 8
        for value in found.values() if isinstance(found, dict) else found:
            assert_bounded(value)
    assert not isinstance(found, str) or len(found) <= 300
    assert not isinstance(found, float) or round(found, 4) == found


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_ends_in_time_where_the_context_is_short(seed: int, tmp_path: Path) -> None:
    prompt = len(make_tiny_tokenizer()(PLAIN)["input_ids"])
    answer = reply(open_tiny(save_model(tmp_path, seed, context=prompt + 130)), Plan)
    assert answer.response_metadata == {"finish_reason": "stop"}
    assert "sparsity" in json.loads(answer.text)


def test_a_schema_is_bounded_and_never_widened() -> None:
    bounded = bound_schema(Everything.model_json_schema())
    assert bounded["additionalProperties"] is False
    properties = bounded["properties"]
    assert properties["number"] == {"title": "Number", "type": "number", **LIMITS, "multipleOf": 1e-4}
    assert properties["whole"] == {"title": "Whole", "type": "integer", **LIMITS}
    assert properties["text"] == {"title": "Text", "type": "string", "maxLength": 300}
    assert properties["kind"] == {"title": "Kind", "type": "string", "enum": ["one", "two"]}
    assert properties["flags"]["maxItems"] == 8
    part = bounded["$defs"]["Part"]["properties"]
    assert (part["name"]["minLength"], part["name"]["maxLength"]) == (1, 20)
    share = {"title": "Share", "type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1, "multipleOf": 1e-4}
    assert part["share"] == share
    assert bound_schema({"type": "array", "maxItems": 3}) == {"type": "array", "maxItems": 3}
    assert bound_schema({"type": "number", "multipleOf": 0.5}) == {"type": "number", **LIMITS, "multipleOf": 0.5}


def test_without_a_schema_it_just_writes(tmp_path: Path) -> None:
    prompt = len(make_tiny_tokenizer()(PLAIN)["input_ids"])
    answer = open_tiny(save_model(tmp_path, context=prompt + 130)).invoke(QUESTION)
    tokens = answer.usage_metadata["output_tokens"]
    assert tokens == 130 if answer.response_metadata["finish_reason"] == "length" else tokens < 130


@pytest.mark.parametrize(("asked", "most"), [(300, 300), (8192, 1024)])
def test_an_answer_has_a_bound(asked: int, most: int, tmp_path: Path) -> None:
    model = open_tiny(save_model(tmp_path, context=4096), agent_answer_tokens=asked)
    assert (model.max_tokens, read_terms(model).answer) == (most, most)
    if asked == most:  # the tiny model never ends a text by itself
        assert model.invoke(QUESTION).usage_metadata["output_tokens"] <= most


def test_it_is_asked_like_any_other_model(tmp_path: Path) -> None:
    spec = save_model(tmp_path)
    records: list[CallRecord] = []
    seen: list[Plan] = []

    def check(plan: Plan) -> None:
        seen.append(plan)
        if len(seen) == 1:
            raise ValueError("not this one")

    answer = ask(open_tiny(spec), Plan, QUESTION, check=check, on_call=records.append)
    assert answer == seen[1]
    assert [(record.method, record.problem) for record in records] == [("grammar", "not this one"), ("grammar", "")]
    assert records[0].input_tokens == len(make_tiny_tokenizer()(PLAIN)["input_ids"])
    assert records[1].input_tokens > records[0].input_tokens
    assert all(record.output_tokens > 0 for record in records)


def test_a_prompt_that_is_too_long_is_refused_in_one_line(tmp_path: Path) -> None:
    prompt = len(make_tiny_tokenizer()(PLAIN)["input_ids"])
    spec = save_model(tmp_path, context=prompt + 127)
    with pytest.raises(AgentError) as caught:
        ask(open_tiny(spec), Plan, QUESTION)
    assert str(caught.value) == (
        f"{spec} cannot take so long a prompt (it has {prompt} tokens, and with 128 for an answer more than the "
        f"context of {prompt + 127})"
    )


# What it is asked


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (None, PLAIN),
        (TEMPLATE, "<system>You plan.\n<user>Plan round 1.\n<assistant><quiet>"),
        (NO_SYSTEM, "<user>You plan.\n\nPlan round 1.\n<assistant><quiet>"),
    ],
)
def test_the_prompt_follows_the_template(template: str | None, prompt: str, tmp_path: Path) -> None:
    model = open_tiny(save_model(tmp_path, template=template))
    tokenizer = model._loaded.tokenizer
    assert tokenizer.decode(local._encode(tokenizer, QUESTION)) == prompt


def test_the_conversation_keeps_its_roles(tmp_path: Path) -> None:
    tokenizer = open_tiny(save_model(tmp_path, template=TEMPLATE))._loaded.tokenizer
    tokens = local._encode(tokenizer, [*QUESTION, AIMessage("{}"), HumanMessage("No.")])
    assert tokenizer.decode(tokens) == (
        "<system>You plan.\n<user>Plan round 1.\n<assistant>{}\n<user>No.\n<assistant><quiet>"
    )


# How it is loaded


@pytest.mark.parametrize("temperature", [None, 1.5])
def test_the_same_question_gets_the_same_answer_and_leaves_the_random_numbers_alone(
    temperature: float | None, tmp_path: Path
) -> None:
    model = open_tiny(save_model(tmp_path), agent_temperature=temperature)
    before = torch.get_rng_state()
    assert reply(model, Everything).text == reply(model, Everything).text
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_changes_what_is_drawn(tmp_path: Path) -> None:
    spec = save_model(tmp_path)
    answers = {reply(open_tiny(spec, agent_temperature=1.5, seed=seed), Everything).text for seed in range(3)}
    assert len(answers) == 3


def test_no_more_than_two_models_stay_loaded(tmp_path: Path) -> None:
    specs = [save_model(tmp_path / str(seed), seed) for seed in range(3)]
    first, second = (open_tiny(spec)._loaded for spec in specs[:2])
    assert open_tiny(specs[0])._loaded is first
    open_tiny(specs[2])
    assert open_tiny(specs[1])._loaded is second
    assert open_tiny(specs[0])._loaded is not first


def test_a_gguf_file_answers(tmp_path: Path) -> None:
    spec = f"local:{save_tiny_gguf(tmp_path / 'tiny.gguf')}"
    check_model(spec)
    Everything.model_validate_json(reply(open_tiny(spec), Everything).text)


def test_what_certainly_is_not_there_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError) as caught:
        check_model("local:missing.gguf")
    assert str(caught.value) == "model file missing.gguf does not exist; give the path of a .gguf file"


def test_without_the_grammar_library_its_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = save_model(tmp_path)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError) as caught:
        check_model(spec)
    assert str(caught.value) == f"{spec} needs a package that is not installed; try: pip install llguidance"


def test_a_model_that_cannot_be_loaded_is_an_agent_that_fails(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    spec = f"local:{tmp_path}"
    check_model(spec)
    with pytest.raises(AgentError) as caught:
        open_tiny(spec)
    assert str(caught.value).startswith(f"{spec}: model '{tmp_path}' could not be loaded: ")


def test_a_model_without_an_end_is_refused(tmp_path: Path) -> None:
    spec = save_model(tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        options = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({key: value for key, value in options.items() if "eos" not in key}))
    with pytest.raises(AgentError) as caught:
        open_tiny(spec)
    assert str(caught.value) == f"{spec}: model '{tmp_path}' has no token that ends an answer"
