"""A chat model behind OpenAI's protocol, at OpenAI or elsewhere, that is sent no key but its own.

LangChain and OpenAI's client fill in what they are not given from a dozen environment variables (keys, organization,
project, any header at all), wherever the request goes. So the HTTP client takes out again what is not for an address.

Imported where it is used: it takes over a second, and most runs plan without a chat model.
"""

from collections.abc import Callable
from typing import Any

from langchain_openai import ChatOpenAI
from openai import DefaultHttpxClient
from pydantic import SecretStr

from graph.config import RunConfig
from graph.llm.attempts import describe_terms
from graph.llm.keys import ANY_KEY, Key, find_openai, is_loopback, name_variable, read_key

SENT_ELSEWHERE = frozenset(
    ("accept", "accept-encoding", "authorization", "connection", "content-length", "content-type", "host", "user-agent")
)
"""The headers that an address other than OpenAI's gets, beside those in which the client says what it runs on."""
CLIENT_HEADERS = "x-stainless-"
MAX_TOKENS, MAX_COMPLETION_TOKENS = "max_tokens", "max_completion_tokens"


_spellings: dict[str, str] = {}
"""How a model elsewhere wants the bound on its answer called, where it is not as most do."""


class Endpoint(ChatOpenAI):
    """A model at an address; `open_endpoint` makes it."""

    address: str | None = None
    """None for OpenAI."""
    wanted_key: str = ""
    """What an endpoint that refuses the key wants, for people."""

    @property
    def elsewhere(self) -> bool:
        """Whether it is at another address than OpenAI's."""
        return self.address is not None

    def respell_bound(self, words: str) -> bool:
        """Whether an endpoint's words ask for the bound on its answer by another name, which it has from now on."""
        known = _spellings.get(str(self.name), MAX_TOKENS)
        if not self.elsewhere or known != MAX_TOKENS or MAX_COMPLETION_TOKENS not in words:
            return False
        _spellings[str(self.name)] = MAX_COMPLETION_TOKENS
        return True

    def _get_request_payload(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """What is sent. OpenAI renamed the bound on an answer; of others not all have heard of it."""
        payload = super()._get_request_payload(*arguments, **options)
        if self.elsewhere and MAX_COMPLETION_TOKENS in payload:
            payload[_spellings.get(str(self.name), MAX_TOKENS)] = payload.pop(MAX_COMPLETION_TOKENS)
        return payload


def open_endpoint(name: str, address: str | None, spec: str, config: RunConfig) -> Endpoint:
    """The model `name` at an address, or at OpenAI; nothing is sent yet. Raises UserError as `find_openai` does."""
    key = read_key(address)
    hooks: list[Callable[[Any], None]] = [] if address is None else [_keep_from_others(key)]
    return Endpoint(
        name=f"openai:{name} at {address}" if address else spec,
        address=address,
        wanted_key=_describe_wanted(key, address),
        model=name,
        base_url=address or find_openai(spec),
        # Never None, for which LangChain would take OPENAI_API_KEY; where there is no key the header goes again.
        api_key=SecretStr(key.value or "none"),
        openai_proxy=None,  # proxies are those of HTTPS_PROXY; LangChain refuses its own variable beside a client
        http_socket_options=(),  # for a client of LangChain's own; it would warn of proxies that it goes around
        temperature=config.agent_temperature,  # said aloud when None, since langchain fills in a 1 for o1 otherwise
        timeout=config.agent_timeout,
        max_completion_tokens=config.agent_answer_tokens,
        max_retries=0,  # the ladder repeats requests, and counts them
        metadata=describe_terms(config.agent_retries, config.agent_answer_tokens),
        # Compatible endpoints rarely have the Responses API, which langchain picks by the model's name.
        use_responses_api=False if address else None,
        # A graph streamed in mode `messages` would stream the model too, and lose the token counts.
        disable_streaming=True,
        http_client=DefaultHttpxClient(
            event_hooks={"request": hooks},
            follow_redirects=False,  # to wherever an endpoint says
            # What is for this machine goes through no proxy, which could read it.
            trust_env=address is None or not is_loopback(address),
        ),
        # Minutes of pruning lie between two calls: a kept connection would be stale by then.
        default_headers={"Connection": "close"},
    )


def _keep_from_others(key: Key) -> Callable[[Any], None]:
    """A hook of the HTTP client: the endpoint's own key or none, and no header that is meant for OpenAI."""

    def strip(request: Any) -> None:
        for header in [header.lower() for header in request.headers]:
            if header not in SENT_ELSEWHERE and not header.startswith(CLIENT_HEADERS):
                del request.headers[header]
        if key.value:
            request.headers["Authorization"] = f"Bearer {key.value}"
        else:
            request.headers.pop("Authorization", None)

    return strip


def _describe_wanted(key: Key, address: str | None) -> str:
    if key.value or address is None:
        return f"another API key than {key.variable} holds"
    return f"an API key: set {name_variable(address)} or {ANY_KEY}"
