"""A library that is missing or too old is one line, before anything is imported."""

import sys

import pytest

from tools.base import parts


def check(monkeypatch: pytest.MonkeyPatch, *wanted: str) -> None:
    monkeypatch.setattr(parts, "requires", lambda _: list(wanted))
    parts.check_parts()


def test_what_is_installed_passes() -> None:
    parts.check_parts()


def test_parts_of_extras_and_of_other_systems_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, 'no-such-part>=1; extra == "eval"', 'no-such-part; sys_platform == "beos"')


@pytest.mark.parametrize(
    ("wanted", "said"),
    [("no-such-part>=1", "no-such-part is missing"), ("pytest>=999", f"pytest {pytest.__version__} does not fit")],
)
def test_one_line_and_what_to_do(
    wanted: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        check(monkeypatch, "pytest>=1", wanted)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {said}; run: {sys.executable} -m pip install '{wanted}'\n"
