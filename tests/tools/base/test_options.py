"""Options from flags, environment and YAML, in this order, for any model of fields; one line for what is wrong."""

import re
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from tools.base.errors import UserError
from tools.base.options import CONFIGS, Parser, add_flags, check_options, parse_flags, read_options, read_yaml
from tools.base.settings import TeamSettings, WorkbenchSettings


class Garden(BaseModel):
    """What a command might ask."""

    model_config = ConfigDict(extra="forbid")

    hedge: str = Field("hawthorn", description="What grows, 100 % of it.")
    metres: int = Field(20, ge=1, description="How long it is.")
    season: Literal["winter", "autumn"] = Field("winter", description="When it is laid.")
    stakes: bool = Field(False, description="Whether it is staked.")
    trees_left: list[str] = Field([], description="Standards that stay.")

    @field_validator("trees_left", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Garden.model_fields:
        monkeypatch.delenv(f"BILLHOOK_{name.upper()}", raising=False)


def make_parser() -> Parser:
    parser = Parser(prog="lay")
    parser.add_argument("--config")
    add_flags(parser, Garden)
    return parser


def parse(*arguments: str) -> dict[str, Any]:
    return parse_flags(make_parser(), Garden, list(arguments))[1]


# --- flags -----------------------------------------------------------------------------------------------------


def test_a_flag_for_every_field_with_its_sentence_choices_and_default() -> None:
    text = " ".join(make_parser().format_help().split())
    assert "fields of the config:" in text
    assert "--hedge HEDGE What grows, 100 % of it. Default: 'hawthorn'." in text
    assert "--metres METRES How long it is. Default: 20." in text
    assert "--season SEASON When it is laid. One of: winter, autumn. Default: 'winter'." in text
    assert "--stakes, --no-stakes Whether it is staked. Default: False." in text
    assert "--trees-left LEFT Standards that stay. Default: []." in text


def test_only_what_was_given_is_among_the_fields() -> None:
    assert parse() == {}
    assert parse("--metres", "3", "--no-stakes", "--trees-left=oak,ash") == {
        "metres": "3",
        "stakes": False,
        "trees_left": "oak,ash",
    }
    options, flags = parse_flags(make_parser(), Garden, ["--config", "x.yaml", "--stakes"])
    assert (options.config, flags) == ("x.yaml", {"stakes": True})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--meters", "3"], "unknown option '--meters'; did you mean --metres?"),
        (["--meters=3"], "unknown option '--meters=3'; did you mean --metres?"),
        (["--trees", "oak"], "unknown option '--trees'; did you mean --metres?"),
        (["--q", "3"], "unknown option '--q'; see --help"),
        (["oak"], "unknown option 'oak'; see --help"),
        (["--metres"], "argument --metres: expected one argument"),
        (["--stakes=yes"], "argument --stakes/--no-stakes: ignored explicit argument 'yes'"),
    ],
)
def test_flags_that_cannot_be_read(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        parse(*arguments)


# --- reading ---------------------------------------------------------------------------------------------------


def test_flags_over_variables_over_the_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "garden.yaml"
    file.write_text("metres: 30\nseason: autumn\nhedge: hazel\n")
    assert read_options(Garden, {}, None) == Garden()
    assert read_options(Garden, {}, file) == Garden(metres=30, season="autumn", hedge="hazel")
    monkeypatch.setenv("BILLHOOK_SEASON", "winter")
    monkeypatch.setenv("BILLHOOK_METRES", "40")
    monkeypatch.setenv("BILLHOOK_TREES_LEFT", "oak,ash")
    read = read_options(Garden, {"metres": "50"}, file)
    assert read == Garden(metres=50, season="winter", hedge="hazel", trees_left=["oak", "ash"])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"meters": 3}, "unknown field 'meters'; did you mean metres?"),
        ({"xyz": 3}, "unknown field 'xyz'; see --help for all fields"),
        ({"metres": 0}, "metres: input should be greater than or equal to 1, not '0'"),
        ({"season": "May"}, "season: input should be 'winter' or 'autumn', not 'May'"),
        (
            {"metres": "far", "stakes": "often"},
            "metres: input should be a valid integer, unable to parse string as an integer, not 'far'; "
            "stakes: input should be a valid boolean, unable to interpret input, not 'often'",
        ),
    ],
)
def test_values_that_are_wrong(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        check_options(Garden, values)
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        read_options(Garden, values, None)


def test_a_file_is_read_as_it_looks(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("pattern: 2:4\nworkers: 4\ntau: 1e-3\nsparsity: [0.45, 2:4]\npartial: true\n")
    assert read_yaml(file) == {
        **{"pattern": "2:4", "workers": 4, "tau": 0.001},
        **{"sparsity": [0.45, "2:4"], "partial": True},
    }
    assert read_options(TeamSettings, {}, file, ignore_unknown=True).workers == "4"
    file.write_text("# nothing yet\n")
    assert read_yaml(file) == {}


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
def test_numbers_are_finite(number: str) -> None:
    with pytest.raises(UserError, match=r"^disk: input should be a finite number, not "):
        check_options(TeamSettings, {"disk": number})


def test_names_are_text() -> None:
    with pytest.raises(UserError, match=r"^hedge: 'caf\\udce9' is not UTF-8; give files and directories names that"):
        check_options(Garden, {"hedge": "caf\udce9"})


def test_a_file_for_another_command_may_hold_more_fields(tmp_path: Path) -> None:
    file = tmp_path / "garden.yaml"
    file.write_text("metres: 30\nplanner: heuristic\n")
    assert read_options(Garden, {}, file, ignore_unknown=True) == Garden(metres=30)
    with pytest.raises(UserError, match=r"^unknown field 'planner'; see --help for all fields$"):
        read_options(Garden, {}, file)
    with pytest.raises(UserError, match=r"^unknown field 'planner'"):  # what is not from the file is never ignored
        read_options(Garden, {"planner": "x"}, file, ignore_unknown=True)
    near = f"^{re.escape(str(file))}: unknown field 'metres_'; did you mean metres\\?$"
    file.write_text("metres_: 30\nplanner: heuristic\n")
    with pytest.raises(UserError, match=near):
        read_options(Garden, {}, file, ignore_unknown=True)
    file.write_text("metres: 0\nplanner: heuristic\n")
    with pytest.raises(UserError, match=r"^metres: "):
        read_options(Garden, {}, file, ignore_unknown=True)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_config_of_a_run_tells_other_commands_its_model_and_texts(file: Path) -> None:
    read = read_options(WorkbenchSettings, {}, file, ignore_unknown=True)
    given = {name: value for name, value in read_yaml(file).items() if name in WorkbenchSettings.model_fields}
    assert {name: getattr(read, name) for name in given} == given


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"does not exist; Billhook's own are in configs/: paper, quickstart, qwen3-4b"):
        read_yaml(tmp_path / "none.yaml")
    file = tmp_path / "bad.yaml"
    file.write_text("a: [b")
    with pytest.raises(UserError, match=r"^config file .*bad.yaml is not YAML: [^\n]*$"):
        read_yaml(file)

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"^config file .*bad.yaml cannot be read: Permission denied$"):
        read_yaml(file)
    monkeypatch.undo()
    file.write_text("- a\n")
    with pytest.raises(UserError, match=r"^config file .*bad.yaml must hold one 'field: value' a line$"):
        read_yaml(file)
