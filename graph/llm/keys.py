"""Which key goes to which address that speaks OpenAI's protocol, and which goes nowhere.

`OPENAI_API_KEY` goes to OpenAI alone, and only where no address is named. An address gets the key of its own variable,
`BILLHOOK_HOST_API_KEY`, or that of `BILLHOOK_API_KEY`; over plain http to another machine it gets none.
"""

import ipaddress
import os
import re
from typing import NamedTuple
from urllib.parse import urlsplit

from tools.base.errors import UserError
from tools.base.secrets import redact
from tools.base.words import one_line

OPENAI = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
ANY_KEY = "BILLHOOK_API_KEY"
"""For any address that has no variable of its own."""
ADDRESS_VARIABLES = ("OPENAI_BASE_URL", "OPENAI_API_BASE")
"""Of OpenAI's client and of LangChain: where they would send what is meant for OpenAI."""


class Key(NamedTuple):
    """A key, "" for none, and the variable that it comes from, or would."""

    variable: str
    value: str


def read_key(address: str | None) -> Key:
    """The key for an address, or for OpenAI where none is named.

    An address's own variable counts where it is set at all: empty, it keeps `BILLHOOK_API_KEY` from that address.
    """
    names = (OPENAI_KEY,) if address is None else (name_variable(address), ANY_KEY)
    name = next((name for name in names if name in os.environ), names[0])
    return Key(name, os.environ.get(name, "").strip())


def name_variable(address: str) -> str:
    """The variable of an address's own key: BILLHOOK_OPENROUTER_AI_API_KEY for https://openrouter.ai/api/v1."""
    host = re.sub(r"[^A-Z0-9]+", "_", (urlsplit(address).hostname or "").upper()).strip("_")
    return f"BILLHOOK_{host}_API_KEY"


def check_key(spec: str, address: str | None) -> None:
    """Refuse, before anything is sent, a key that is missing or that would go where it must not. Raises UserError."""
    key = read_key(address)
    if address is None:
        find_openai(spec)
        if not key.value:
            raise UserError(
                f"{spec} needs an API key: set the environment variable {OPENAI_KEY}, or name an endpoint that needs "
                f"none with {spec}@http://HOST:PORT/v1"
            )
    elif key.value and urlsplit(address).scheme != "https" and not is_loopback(address):
        raise UserError(
            f"{spec} would get the key in {key.variable} over plain http, where anybody on the way can read it; use "
            f"https or a tunnel to 127.0.0.1, or set {name_variable(address)} to nothing if it needs no key"
        )


def find_openai(spec: str) -> str:
    """OpenAI's address, or the one of a region of OpenAI's that the environment names.

    Raises UserError where it names another: neither may that one get OpenAI's key, nor OpenAI what is meant for it.
    """
    name = next((name for name in ADDRESS_VARIABLES if os.environ.get(name, "").strip()), None)
    if name is None:
        return OPENAI
    address = os.environ[name].strip()
    if not _is_openai(address):
        shown = one_line(redact(address), 100)
        raise UserError(
            f"{spec} is OpenAI's, but {name} names {shown!r}, which is not sent {OPENAI_KEY}: write {spec}@{shown} and "
            f"set {name_variable(address)} to its key, or unset {name}"
        )
    return address


def _is_openai(address: str) -> bool:
    """https://api.openai.com, or a region's such as https://eu.api.openai.com."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    plain = parts.scheme == "https" and port in (None, 443) and "@" not in parts.netloc
    return plain and (host == "api.openai.com" or host.endswith(".api.openai.com"))


def is_loopback(address: str) -> bool:
    """Whether what is sent to an address stays on this machine."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
