"""A command's options as one pydantic model: a flag for every field, and how they are read.

parser = Parser(prog="python -m tools.compare")
parser.add_argument("--config", metavar="FILE")
add_flags(parser, Settings)
options, flags = parse_flags(parser, Settings, arguments)
settings = read_options(Settings, flags, Path(options.config), ignore_unknown=True)
"""

import argparse
import difflib
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError, create_model
from pydantic_settings import BaseSettings, SettingsConfigDict

from tools.base.errors import UserError, in_one_line
from tools.base.secrets import redact

READS_FILES = "reads_files"
"""In pydantic's context where options are read for a person: fields may then read files that the options name."""

# A wheel has configs/ beside this file; in a checkout it stands at the top.
_PLACES = (Path(__file__).resolve().parent / "configs", Path(__file__).resolve().parents[2] / "configs")
CONFIGS = next((folder for folder in _PLACES if folder.is_dir()), _PLACES[-1])

Options = TypeVar("Options", bound=BaseModel)


class Parser(argparse.ArgumentParser):
    """Complains in one line, as UserError, instead of printing its usage and ending the process.

    Flags are written out, and a description is printed as it is written.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


REFUSED = 2
"""Exit code of a command whose input is refused."""


def refuse(problem: UserError | str) -> int:
    """Tell bad input in one line, without any secret; the exit code that goes with it."""
    print(f"error: {redact(' '.join(str(problem).split()))}", file=sys.stderr)
    return REFUSED


def add_flags(parser: argparse.ArgumentParser, model: type[BaseModel]) -> None:
    """One flag per field of the model, with its sentence, its choices and its default."""
    fields = parser.add_argument_group("fields of the config")
    for name, field in model.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        choices = f" One of: {', '.join(get_args(field.annotation))}." if _is_choice(field.annotation) else ""
        text = f"{field.description}{choices} Default: {field.default!r}.".replace("%", "%%")
        if field.annotation is bool:
            fields.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif field.annotation == dict[str, str]:
            fields.add_argument(flag, metavar="NAME=SOURCE", action="append", default=None, help=text)
        else:
            fields.add_argument(flag, metavar=name.rsplit("_", 1)[-1].upper(), default=None, help=text)


def _is_choice(annotation: Any) -> bool:
    return get_origin(annotation) is Literal


def parse_flags(
    parser: argparse.ArgumentParser, model: type[BaseModel], arguments: list[str]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """All that a parser with the model's flags reads, and of it the model's fields that were given.

    Raises UserError in one line, with the nearest option for one that does not exist.
    """
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1, cutoff=0.5)
        raise UserError(f"unknown option {unknown[0]!r}{f'; did you mean {near[0]}?' if near else '; see --help'}")
    return options, {name: value for name in model.model_fields if (value := getattr(options, name)) is not None}


PREFIX = "BILLHOOK_"
"""Before the name of a field, of the variable that sets it."""

MISTYPED = 0.9
"""Names at least so much alike, by difflib's ratio, are one and the same, mistyped: less alike are fields of two
commands, such as seed and seeds."""


class _Environment(BaseSettings):
    """The names of a model's fields as `BILLHOOK_…` variables, unparsed."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore")


def read_environment(model: type[BaseModel]) -> dict[str, str]:
    """The fields of a model that `BILLHOOK_…` variables name, unchecked. Raises UserError for one that is all but a
    field: others, such as keys, are not the model's."""
    for variable in os.environ:
        name = variable.lower().removeprefix(PREFIX.lower())
        if not variable.upper().startswith(PREFIX) or name in model.model_fields:
            continue
        if near := difflib.get_close_matches(name, model.model_fields, n=1, cutoff=MISTYPED):
            raise UserError(f"unknown variable {variable}; did you mean {PREFIX}{near[0].upper()}?")
    names = dict.fromkeys(model.model_fields, (str | None, None))
    found = create_model("_Variables", __base__=_Environment, **names)()  # type: ignore[call-overload]
    return {name: value for name, value in found.model_dump().items() if value is not None}


def read_options(
    model: type[Options], flags: dict[str, Any], path: Path | None, *, ignore_unknown: bool = False
) -> Options:
    """The options: flags over `BILLHOOK_…` variables over the YAML file over the model's defaults.

    With `ignore_unknown` the file may hold fields that the model has not, unless they are all but one of its own: the
    config of a run says more than a command about its model or its texts needs. Raises UserError in one line for a file
    that cannot be read, an unknown field (with the nearest name) or a value out of bounds.
    """
    values = read_yaml(path) if path else {}
    if ignore_unknown:
        for name in values:
            if name in model.model_fields:
                continue
            if near := difflib.get_close_matches(name, model.model_fields, n=1, cutoff=MISTYPED):
                raise UserError(f"{path}: unknown field {name!r}; did you mean {near[0]}?")
        values = {name: value for name, value in values.items() if name in model.model_fields}
    return check_options(model, {**values, **read_environment(model), **flags})


def check_options(model: type[Options], values: dict[str, Any]) -> Options:
    """The options from plain values. Raises UserError in one line."""
    unknown = sorted(set(values) - set(model.model_fields))
    if unknown:
        near = difflib.get_close_matches(unknown[0], model.model_fields, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; see --help for all fields"
        raise UserError(f"unknown field {unknown[0]!r}{hint}")
    for name, value in values.items():
        if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
            raise UserError(f"{name}: {value!a} is not UTF-8; give files and directories names that are")
    try:
        return model.model_validate(values, context={READS_FILES: True})
    except ValidationError as error:
        raise UserError("; ".join(describe_problem(problem) for problem in error.errors())) from error


def join_list(value: Any) -> str:
    """What an option between commas is: YAML has lists and numbers."""
    return ",".join(str(part) for part in (value if isinstance(value, list) else [value]))


class _Loader(yaml.SafeLoader):
    """As YAML 1.2 has it, in which 2:4 is no number of base 60."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if not tag.endswith((":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML file, unchecked. Raises UserError when it cannot be read."""
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise UserError(f"config file {path} does not exist; Billhook's own are in configs/: {known}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not YAML: {in_one_line(error, 200)}") from error
    if values is None:  # an empty file, or one of comments
        return {}
    if not isinstance(values, dict):
        raise UserError(f"config file {path} must hold one 'field: value' a line")
    return {str(key): value for key, value in values.items()}


def describe_problem(problem: Any) -> str:
    """One of the errors of a ValidationError, in a clause."""
    name = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if not name:  # it is about several fields, which the message names
        return str(message)
    return f"{name}: {message[0].lower()}{message[1:]}, not {str(problem['input'])[:80]!r}"
