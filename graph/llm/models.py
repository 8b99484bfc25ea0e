"""The chat model that a string stands for: `openai:NAME`, `openai:NAME@URL`, `local:SOURCE`, `exchange:DIR`,
`PROVIDER:NAME`.

`heuristic` stands for no model at all.
"""

import importlib.util
import re
from typing import Any
from urllib.parse import urlsplit

from langchain_core.language_models import BaseChatModel
from pydantic import SecretStr

from graph.checks import check_prices
from graph.config import HEURISTIC, MODEL_WORDS, RunConfig
from graph.llm.attempts import describe_terms
from graph.llm.exchange import check_exchange, open_exchange
from graph.llm.keys import check_key, name_variable
from graph.llm.ladder import AgentError
from graph.llm.local import check_local, open_local
from tools.base.errors import UserError
from tools.base.progress import Progress, ignore_progress
from tools.base.secrets import redact
from tools.base.words import one_line


def check_model(spec: str) -> None:
    """See whether a planner or reflector can be asked at all, without asking it.

    Raises UserError when its string makes no sense, when a package it needs is not
    installed, or when it needs a key that is not set.
    """
    if spec == HEURISTIC:
        return
    provider, name = _split_spec(spec)
    if provider == "openai":
        _check_openai(spec)
    elif provider == "local":
        check_local(name)
    elif provider == "exchange":
        check_exchange(name)
    else:
        _open_provider(provider, name, RunConfig())


def check_agents(config: RunConfig) -> None:
    """See whether planner and reflector can be asked, and what they cost be capped. Raises UserError."""
    check_model(config.planner)
    check_model(config.reflector)
    check_prices(config)


def open_model(spec: str, config: RunConfig, progress: Progress = ignore_progress) -> BaseChatModel:
    """Make the chat model that `spec` stands for, called `spec` in errors; anything but `heuristic`.

    Of the config it takes the time-out, retries, the bound on an answer and the temperature (not
    sent when None, because many models refuse any), and for a local model where and how to load one. Keys come from
    the environment. Nothing is asked yet; a local model is loaded, once per process. `progress` hears of files that are
    waited for.

    Raises UserError as `check_model` does, AgentError when a local model cannot be loaded.
    """
    provider, name = _split_spec(spec)
    if provider == "openai":
        return _open_openai(spec, config)
    if provider == "local":
        try:
            return open_local(name, config)
        except UserError as error:
            raise AgentError(f"{spec}: {error}") from None
    if provider == "exchange":
        return open_exchange(name, config.agent_answer_tokens, progress)
    return _open_provider(provider, name, config)


def _split_spec(spec: str) -> tuple[str, str]:
    """(provider, name) of `PROVIDER:NAME`. Raises UserError."""
    match = re.fullmatch(r"([a-z][a-z0-9_]*):(\S(?:.*\S)?)", spec)
    if match is None:
        raise _unknown(spec)
    return match[1], match[2]


def _unknown(spec: str) -> UserError:
    return UserError(f"no such model: {_quote(spec)}; {MODEL_WORDS}")


def _quote(text: str) -> str:
    return repr(one_line(redact(text), 100))


# OpenAI, and whatever speaks its protocol


def _check_openai(spec: str) -> None:
    check_key(spec, _split_address(spec)[1])


def _open_openai(spec: str, config: RunConfig) -> BaseChatModel:
    _check_openai(spec)
    # Imported here because it takes over a second, and most runs plan without a chat model.
    from graph.llm.endpoint import open_endpoint

    name, address = _split_address(spec)
    return open_endpoint(name, address, spec, config)


def _split_address(spec: str) -> tuple[str, str | None]:
    """(name, address or None) of `openai:NAME` or `openai:NAME@URL`. Raises UserError."""
    match = re.fullmatch(r"openai:([^\s@]+)(?:@(https?://\S+))?", spec)
    if match is None:
        raise _unknown(spec)
    name, url = match[1], match[2]
    if url is not None and not _is_address(url):
        raise UserError(f"the model's address {_quote(url)} is not of the form http://HOST:PORT/v1")
    if url is not None and "@" in urlsplit(url).netloc:  # it would stand in config.yaml and in every checkpoint
        raise UserError(
            "the model's address holds a password; put its key into the environment variable "
            f"{name_variable(url)} instead"
        )
    return name, url


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


# Any provider of LangChain's


def _open_provider(provider: str, name: str, config: RunConfig) -> BaseChatModel:
    """A model of an installed LangChain provider. Raises UserError when it is not installed or cannot be made."""
    spec = f"{provider}:{name}"
    if importlib.util.find_spec("langchain") is None:
        package = f"langchain-{provider.replace('_', '-')}"
        raise UserError(f"{_quote(spec)} needs packages that are not installed; try: pip install langchain {package}")
    from langchain.chat_models import init_chat_model

    # The ladder repeats requests, and counts them.
    options: dict[str, Any] = {"timeout": config.agent_timeout, "max_retries": 0}
    options["num_predict" if provider == "ollama" else "max_tokens"] = config.agent_answer_tokens
    options["metadata"] = describe_terms(config.agent_retries, config.agent_answer_tokens)
    if config.agent_temperature is not None:
        options["temperature"] = config.agent_temperature
    try:
        model: BaseChatModel = init_chat_model(
            name, model_provider=provider, name=spec, disable_streaming=True, **options
        )
    except Exception as error:  # a package that is missing, which it names, or whatever else the provider minds
        raise UserError(f"{_quote(spec)} cannot be used: {_shorten(error)}") from None
    if config.agent_answer_tokens not in model.__dict__.values():  # LangChain drops what a model does not know
        raise UserError(f"{_quote(spec)} cannot be used: it takes no bound on the length of its answers")
    for field, variable in model.lc_secrets.items():
        if variable.endswith("_API_KEY") and not _reveal(getattr(model, field, None)):
            raise UserError(f"{_quote(spec)} needs an API key: set the environment variable {variable}")
    return model


def _reveal(secret: Any) -> str:
    value = secret.get_secret_value() if isinstance(secret, SecretStr) else secret
    return str(value or "").strip()


def _shorten(error: Exception) -> str:
    """An error's words as a line without secrets."""
    return one_line(redact(str(error)), 300) or type(error).__name__
