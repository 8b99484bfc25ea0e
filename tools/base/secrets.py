"""Keys for models and hubs: read from the environment or `.env`, never shown or written anywhere."""

import json
import os
import re

from dotenv import dotenv_values

from tools.base.errors import UserError, in_one_line

_SUFFIXES = ("_API_KEY", "_TOKEN")


def read_secrets() -> None:
    """Put the keys of `.env` in the present directory into the environment, where it has none.

    Only names that end in _API_KEY or _TOKEN are taken; options are not read from there. Raises UserError where it is
    not UTF-8.
    """
    try:
        values = dotenv_values(".env")
    except UnicodeDecodeError as error:
        raise UserError(f".env is not UTF-8 text: {in_one_line(error, 200)}; save it as that") from error
    for name, value in values.items():
        if value and name.endswith(_SUFFIXES):
            os.environ.setdefault(name, value)


def redact(text: str) -> str:
    """`text`, plain or as JSON, with everything that is or looks like a secret replaced by `[key]`.

    That is the value of every environment variable whose name ends in _API_KEY or _TOKEN (from 8 characters on;
    shorter ones are placeholders such as `none`, and would blank out ordinary words), anything shaped like `sk-…`,
    keys masked with asterisks as error messages quote them, and passwords in URLs.
    """
    for secret in sorted(_find_secrets(), key=len, reverse=True):
        text = text.replace(secret, "[key]")
    text = re.sub(r"(?<![A-Za-z0-9])sk-[\w*.…-]*[\w*…-]", "[key]", text)
    if "****" in text:
        text = re.sub(r"\b[\w-]{2,80}\*{4,}[\w-]*", "[key]", text)  # bounded, to stay linear in the text
    return re.sub(r"(?<=://)[^\s/@]+(?=@)", "[key]", text)


def _find_secrets() -> set[str]:
    plain = {v.strip() for k, v in os.environ.items() if k.upper().endswith(_SUFFIXES) and len(v.strip()) >= 8}
    return plain | {json.dumps(value)[1:-1] for value in plain}
