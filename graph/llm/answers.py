"""The JSON in what a model says: bare, fenced, after thoughts or amid prose; and what is wrong with it, in its words.

Whatever comes back is text from outside: it is searched for JSON, validated here, and what does not fit has a reason
that the model can act on.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from graph.llm.toolbox import ToolCall, dump
from tools.base.words import one_line, shorten

T = TypeVar("T", bound=BaseModel)

REASON_LIMIT = 1_000
"""Characters of the reason that goes with an answer that is handed back."""
PROBLEM_LIMIT = 10
"""Problems named in one reason."""
READ_LIMIT = 1_000_000
"""Characters of an answer that are read at all; no sensible one is a hundredth of it."""
CALL_LIMIT = 20
"""Tools that one reply may ask for; what follows is not heard."""

_OBJECT = re.compile(r"""\{\s*["'}]""")
"""Where JSON begins, or what a model takes for it; any other brace is prose."""


def parse_reply(text: str, schema: type[T], *, tools: bool) -> T | list[ToolCall]:
    """The `schema` in a model's answer: bare, fenced, after thoughts, or amid prose.

    Of several objects that fit, the last counts, as models end with their conclusion. With `tools`, and if the last
    object that means anything asks for one, all the calls in the text. Raises ValueError with a reason that the model
    can act on, of at most about 1,000 characters.
    """
    if not text.strip():
        raise ValueError("The answer is empty.")
    if len(text) > READ_LIMIT:
        raise ValueError(f"The answer is longer than {READ_LIMIT:,} characters.")
    objects, broken = _find_objects(drop_thinking(text))
    reasons = []
    for found in reversed(objects[-CALL_LIMIT:]):
        call = _as_call(found) if tools else None
        if call and call.name != schema.__name__:
            calls = [call for found in objects if (call := _as_call(found)) and call.name != schema.__name__]
            return calls[:CALL_LIMIT]
        try:
            return _validate(call.arguments if call and isinstance(call.arguments, dict) else found, schema)
        except ValueError as error:
            reasons.append(str(error))
    reasons = [f"The JSON is broken: {broken}."] if broken else reasons or ["There is no JSON object in the answer."]
    raise ValueError(shorten(clean(reasons[0]), REASON_LIMIT))


def find_prose(text: str) -> str:
    """What stands before the first JSON object."""
    opening = _OBJECT.search(text)
    return text[: opening.start()] if opening else text


def _as_call(found: dict[str, Any]) -> ToolCall | None:
    """The call of a tool that an object means: as told, or `{"name": …, "arguments": …}` as in many chat templates."""
    key = "tool" if "tool" in found else "name"
    name = found.get(key)
    if not isinstance(name, str) or (key == "name" and "arguments" not in found):
        return None
    arguments = found.get("arguments", {other: value for other, value in found.items() if other != key})
    if isinstance(arguments, str):
        arguments = _load(arguments)
    return ToolCall(clean(name), _load(clean(dump(arguments))))


def _load(text: str) -> Any:
    """A JSON value; where there is none the text, of which the toolbox will say that it is no object."""
    try:
        return json.loads(text, parse_int=_parse_int)
    except (ValueError, RecursionError):
        return text


def drop_thinking(text: str) -> str:
    """What follows the thoughts; templates often open them in the prompt, so only the closing tag shows."""
    if text.lstrip().startswith("{"):
        return text
    spoken = re.split(r"</think(?:ing)?>", text)[-1]
    return re.split(r"<think(?:ing)?>", spoken)[0].strip()


def _find_objects(text: str) -> tuple[list[dict[str, Any]], str]:
    """All outermost JSON objects in a text, and what is wrong with the first that is broken, or ""."""
    decoder = json.JSONDecoder(strict=False, parse_int=_parse_int)
    objects: list[dict[str, Any]] = []
    broken: list[str] = []
    end = 0
    # Each broken object costs a walk over the text (to count lines for its error), so not too many of them.
    while len(broken) < 100 and (opening := _OBJECT.search(text, end)):
        try:
            found, end = decoder.raw_decode(text, opening.start())
            objects.append(found)
        except json.JSONDecodeError as error:
            broken.append(f"{error.msg} at {_excerpt(text, error.pos)}")
            # Going on from where it broke keeps parts of a broken object from passing for answers.
            end = max(opening.start() + 1, error.pos)
        except RecursionError:
            broken.append("it is nested too deeply")
            break
    return objects, broken[0] if broken else ""


def _excerpt(text: str, position: int) -> str:
    return repr(one_line(text[max(0, position - 20) : position + 20], 40))


def _parse_int(digits: str) -> int | float:
    """A whole number; one too long for any field becomes infinite, and is refused as such."""
    return int(digits) if len(digits) < 300 else math.inf


def _validate(found: dict[str, Any], schema: type[T]) -> T:
    odd = [f"{path}: {value} is no number; write a finite one" for path, value in _non_finite(found)]
    if odd:
        raise ValueError(_list_problems(odd))
    try:
        return schema.model_validate(found)
    except ValidationError as error:
        reason = explain(error)
    raise ValueError(reason)


def explain(error: ValidationError) -> str:
    """What is wrong with an object, in words that a model can act on, at most about 1,000 characters."""
    details: Any = error.errors(include_url=False)
    return _list_problems([_describe_problem(detail) for detail in details])


def _non_finite(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Path and spelling of every NaN and infinity, without recursion."""
    stack: list[tuple[str, Any]] = [("", found)]
    while stack:
        path, value = stack.pop()
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        stack += [(f"{path}.{one_line(str(key), 40)}".lstrip("."), item) for key, item in items]
        if isinstance(value, float) and not math.isfinite(value):
            yield shorten(path, 100), json.dumps(value)


def _describe_problem(detail: dict[str, Any]) -> str:
    """One of pydantic's errors as `path: what is wrong`, with advice where a number looks like a percentage."""
    path = ".".join(one_line(str(part), 40) for part in detail["loc"]) or "the answer"
    what = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"{path}: there is no such field; leave it out"
    if detail["type"] == "missing":
        return f"{path}: is missing"
    given = detail["input"]
    if isinstance(given, dict | list):
        return f"{path}: {what}"
    return f"{path}: {what}, not {one_line(json.dumps(given, default=str), 40)}{_advise_fraction(detail)}"


def _advise_fraction(detail: dict[str, Any]) -> str:
    """Advice for 45 or "45%" where a share was wanted."""
    given, limits = detail["input"], detail.get("ctx", {})
    percent = re.fullmatch(r"\s*(\d{1,3}(?:\.\d+)?)\s*%\s*", given) if isinstance(given, str) else None
    above_one = 1 in (limits.get("lt"), limits.get("le")) and isinstance(given, int | float) and 1 < given <= 100
    if not percent and not above_one:
        return ""
    share = float(percent[1] if percent else given) / 100
    return f"; that looks like a percentage: write {share:.6g}"


def _list_problems(problems: Sequence[str]) -> str:
    """At most `PROBLEM_LIMIT` problems, one a line, within `REASON_LIMIT` characters."""
    lines = [one_line(problem, 200) for problem in problems[:PROBLEM_LIMIT]]
    more = len(problems) - len(lines)
    text = shorten("\n".join(lines), REASON_LIMIT - 30)
    return f"{text}\nand {more:,} more" if more else text


# Text


def clean(text: str) -> str:
    """Text that can be sent and stored: JSON may smuggle in halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()
