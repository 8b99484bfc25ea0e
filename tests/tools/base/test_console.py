"""What commands that go on where they stopped have in common."""

import os
import signal
import time
from pathlib import Path

import pytest

from tools.base.console import carry_out
from tools.base.errors import DamagedArtifact, UserError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_and_is_then_what_it_was(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)

    def work() -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    assert carry_out(work) == 1
    assert capsys.readouterr().err == "stopped; the rows that are done are kept, and the same command goes on\n"
    assert carry_out(work, "stopped; nothing was written") == 1
    assert capsys.readouterr().err == "stopped; nothing was written\n"
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("no such model"), "error: no such model\n"),
        (DamagedArtifact("layer 1 is damaged"), "error: layer 1 is damaged; begin again with another --out\n"),
    ],
)
def test_what_users_can_mend_is_one_line(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise error

    assert carry_out(work) == 2
    assert capsys.readouterr().err == said


def test_keys_are_read_for_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GARDEN_TOKEN", "")  # so that it is undone
    monkeypatch.delenv("GARDEN_TOKEN")
    (tmp_path / ".env").write_text("GARDEN_TOKEN=hf_secret_value\n")
    found: list[str] = []
    assert carry_out(lambda: found.append(os.environ["GARDEN_TOKEN"])) == 0 and found == ["hf_secret_value"]
    monkeypatch.delenv("GARDEN_TOKEN")
    (tmp_path / ".env").write_bytes("GARDEN_TOKEN=x".encode("utf-16"))
    assert carry_out(pytest.fail) == 2
    assert capsys.readouterr().err.startswith("error: .env is not UTF-8 text: ")
