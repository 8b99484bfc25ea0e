"""What a model's string stands for, what is sent to it, and what is said when it cannot be had."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from graph.config import RunConfig
from graph.llm.ask import CallRecord, ask
from graph.llm.ladder import AgentError
from graph.llm.models import check_model, open_model
from graph.planning.plan import Plan
from tests.graph.llm.asking import KEY, PLAN, QUESTION
from tests.openai_server import OpenAIServer
from tools.base.errors import UserError

PROVIDER = '''
"""Stands in for langchain's own: one provider whose models call tools, one whose models only write."""
import json
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from pydantic import SecretStr


class Writer(BaseChatModel):
    model: str
    timeout: float
    max_retries: int
    max_tokens: int
    temperature: float | None = None
    end: str = "end_turn"

    @property
    def _llm_type(self) -> str:
        return "writer"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **options: Any) -> ChatResult:
        settings = [self.model, self.timeout, self.max_retries, self.max_tokens, self.temperature]
        message = AIMessage(
            json.dumps({"sparsity": 0.3, "reason": str(settings)}), response_metadata={"stop_reason": self.end}
        )
        return ChatResult(generations=[ChatGeneration(message=message)])


class Endless(Writer):
    max_tokens: None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "max_tokens": None})


class Caller(Writer):
    caller_api_key: SecretStr = SecretStr("")

    @property
    def lc_secrets(self) -> dict[str, str]:
        return {"caller_api_key": "CALLER_API_KEY"}

    def bind_tools(self, tools: Any, *, tool_choice: Any = None, **options: Any) -> Any:
        return self.bind(tools=tools, tool_choice=tool_choice)

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **options: Any) -> ChatResult:
        arguments = {"sparsity": 0.3, "reason": options["tool_choice"]}
        message = AIMessage("", tool_calls=[{"name": options["tool_choice"], "args": arguments, "id": "1"}])
        return ChatResult(generations=[ChatGeneration(message=message)])


def init_chat_model(model: str, *, model_provider: str, **options: Any) -> BaseChatModel:
    if model_provider == "writer":
        return Writer(model=model, **options)
    if model_provider == "cutter":
        return Writer(model=model, end="max_tokens", **options)
    if model_provider == "caller":
        return Caller(model=model, caller_api_key=__import__("os").environ.get("CALLER_API_KEY", ""), **options)
    if model_provider == "endless":
        return Endless(model=model, **options)
    if model_provider == "absent":
        raise ImportError("Initializing ChatAbsent requires the langchain-absent package.\\nPlease install it with "
                          "`pip install langchain-absent`")
    raise ValueError(f"Unsupported provider={model_provider!r}.")
'''


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, unknown_endpoints: None) -> None:
    monkeypatch.setenv("BILLHOOK_API_KEY", KEY)


@pytest.fixture
def providers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package `langchain` with the providers above, whether the real one is installed or not."""
    (tmp_path / "langchain").mkdir()
    (tmp_path / "langchain" / "__init__.py").write_text("")
    (tmp_path / "langchain" / "chat_models.py").write_text(PROVIDER)
    for name in [name for name in sys.modules if name.split(".")[0] == "langchain"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("langchain.chat_models", "langchain"):
        sys.modules.pop(name, None)


# OpenAI's protocol


@pytest.mark.parametrize(
    "spec", ["heuristic", "openai:gpt-5.1", "openai:org/m:1@http://localhost:8000/v1", "openai:m@https://h"]
)
def test_model_that_can_be_asked(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    check_model(spec)
    assert (RunConfig(planner=spec).planner, RunConfig(reflector=spec).reflector) == (spec, spec)


def test_missing_key_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    check_model("openai:m@https://h/v1")
    for use in (check_model, lambda spec: open_model(spec, RunConfig())):
        with pytest.raises(UserError) as caught:
            use("openai:gpt-5.1")
        assert str(caught.value) == (
            "openai:gpt-5.1 needs an API key: set the environment variable OPENAI_API_KEY, or name an endpoint that "
            "needs none with openai:gpt-5.1@http://HOST:PORT/v1"
        )


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        *(
            (
                spec,
                f"no such model: {spec!r}; write heuristic, openai:NAME, openai:NAME@http://HOST:PORT/v1, local:MODEL, "
                "exchange:DIR or PROVIDER:NAME",
            )
            for spec in ("openai", "openai:", "openai:m@ftp://h", "openai:m@", "local:", "Anthropic:x", "a b:c", "")
        ),
        (
            "openai:m@http://h:99999/v1",
            "the model's address 'http://h:99999/v1' is not of the form http://HOST:PORT/v1",
        ),
        ("openai:m@http:///v1", "the model's address 'http:///v1' is not of the form http://HOST:PORT/v1"),
        (
            "openai:m@http://me:secret@h/v1",
            "the model's address holds a password; put its key into the environment variable BILLHOOK_H_API_KEY "
            "instead",
        ),
    ],
)
def test_model_that_makes_no_sense(spec: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_model(spec)
    assert str(caught.value) == said


@pytest.mark.parametrize("spec", ["magic", "openai:", "local: x", " heuristic", "Openai:m"])
def test_config_refuses_what_is_no_model(spec: str) -> None:
    for field in ("planner", "reflector"):
        with pytest.raises(ValidationError, match="write heuristic, openai:NAME, "):
            RunConfig.model_validate({field: spec})


@pytest.mark.parametrize("name", ["o1-mini", "o3", "gpt-5.1", "qwen3-codex"])
def test_what_is_sent(name: str) -> None:
    with OpenAIServer() as server:
        assert ask(open_model(server.planner(name), RunConfig()), Plan, QUESTION) == PLAN
    [request] = server.requests
    assert request.path == "/v1/chat/completions"
    assert set(request.body) == {"max_tokens", "messages", "model", "response_format"} | (
        {"stream"} & set(request.body)
    )
    assert request.body["max_tokens"] == 8192
    assert not request.body.get("stream")
    assert request.body["response_format"]["json_schema"]["name"] == "Plan"
    assert request.key == KEY


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_temperature_is_sent_when_asked_for(temperature: float) -> None:
    with OpenAIServer() as server:
        ask(open_model(server.planner("m"), RunConfig(agent_temperature=temperature)), Plan, QUESTION)
    assert server.requests[0].body["temperature"] == temperature


# Providers of LangChain's


def test_a_provider_without_langchain_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langchain", None)
    for use in (check_model, lambda spec: open_model(spec, RunConfig())):
        with pytest.raises(UserError) as caught:
            use("google_genai:gemini-2.5-pro")
        assert str(caught.value) == (
            "'google_genai:gemini-2.5-pro' needs packages that are not installed; "
            "try: pip install langchain langchain-google-genai"
        )


@pytest.mark.usefixtures("providers")
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            "absent:m",
            "'absent:m' cannot be used: Initializing ChatAbsent requires the langchain-absent package. Please install "
            "it with `pip install langchain-absent`",
        ),
        ("magic:m", "'magic:m' cannot be used: Unsupported provider='magic'."),
        (f"magic:{KEY}", "'magic:[key]' cannot be used: Unsupported provider='magic'."),
        ("endless:m", "'endless:m' cannot be used: it takes no bound on the length of its answers"),
        ("caller:m", "'caller:m' needs an API key: set the environment variable CALLER_API_KEY"),
    ],
)
def test_a_provider_that_cannot_be_used(spec: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_model(spec)
    assert str(caught.value) == said


@pytest.mark.usefixtures("providers")
def test_a_provider_with_tools_is_asked_by_a_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALLER_API_KEY", "k")
    records: list[CallRecord] = []
    plan = ask(open_model("caller:m", RunConfig()), Plan, QUESTION, on_call=records.append)
    assert (plan.sparsity, plan.reason) == (0.3, "Plan")
    assert [record.method for record in records] == ["function_calling"]


@pytest.mark.usefixtures("providers")
def test_a_provider_without_tools_is_asked_in_words() -> None:
    records: list[CallRecord] = []
    config = RunConfig(agent_timeout=7, agent_retries=4, agent_answer_tokens=300, agent_temperature=0.5)
    plan = ask(open_model("writer:org/m:1", config), Plan, QUESTION, on_call=records.append)
    assert plan.reason == "['org/m:1', 7.0, 0, 300, 0.5]"
    assert [record.method for record in records] == ["text"]
    assert ask(open_model("writer:m", RunConfig()), Plan, QUESTION).reason == "['m', 120.0, 0, 8192, None]"


@pytest.mark.usefixtures("providers")
def test_an_answer_that_a_provider_cut_off_is_handed_back() -> None:
    with pytest.raises(AgentError) as caught:
        ask(open_model("cutter:m", RunConfig()), Plan, QUESTION, hand_backs=1)
    assert str(caught.value) == (
        "cutter:m gave no usable Plan in 2 answers; the last one: The answer was cut off at the length limit. Give a "
        "shorter one: fewer adjustments, short reasons."
    )


# What an endpoint says
