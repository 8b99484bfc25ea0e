"""A finished run is pushed to a hub: what arrives, what is refused before any work, and what a dead hub costs."""

import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml
from huggingface_hub import ModelCard

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import read_events, read_summary
from tests.hub_server import HubServer, Repository

TOKEN = "hf_Qw8rTz2pLk5vBn1m"
NAME = "me/tiny-pruned"
PUSH = ("--push-to-hub", NAME)

# How huggingface_hub itself calls its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def finished(easy: Path, tmp_path: Path) -> Path:
    """The home directory of a run that is finished."""
    shutil.copytree(easy.parent, tmp_path / "runs")
    return tmp_path / "runs" / "run"


def read_files(model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.iterdir()}


def test_a_run_is_pushed_when_it_is_finished(
    hub: HubServer, flags: list[str], tmp_path: Path, command: Command
) -> None:
    (tmp_path / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    outcome = command(*flags, *PUSH)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1] == f"pushed: {hub.url}/{NAME}"
    run = tmp_path / "runs" / "run"
    assert set(read_files(run / "model")) == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        "tokenizer_config.json",
    }
    assert hub.repositories == {
        NAME: Repository("private", read_files(run / "model"), ["Model pruned with Billhook"]),
    }
    assert hub.tokens == {TOKEN}
    (event,) = read_events(run, "pushed")
    assert {key: event[key] for key in event if key != "time"} == {
        **{"type": "pushed", "repository": NAME, "url": f"{hub.url}/{NAME}"}
    }


def test_the_card_that_arrives_has_the_figures_and_no_path(hub: HubServer, finished: Path, command: Command) -> None:
    os.environ["HF_TOKEN"] = TOKEN
    assert command("--resume", "run", *PUSH).code == 0
    text = hub.repositories[NAME].files["README.md"].decode()
    summary = read_summary(finished)
    (pruned,) = ModelCard(text).data.eval_results or []
    assert (pruned.metric_type, pruned.metric_value) == ("perplexity", round(summary["perplexity"]["pruned"], 4))
    assert (pruned.dataset_type, pruned.task_type) == ("pydoc", "text-generation")
    front = yaml.safe_load(text.split("---\n")[1])
    assert set(front) == {"library_name", "model-index", "pipeline_tag", "tags"}, "of the source nothing is known"
    report = (finished / "report.md").read_text(encoding="utf-8")
    for kind in ("dense", "uniform Wanda, same sparsity, each block behind its pruned predecessors"):
        (row,) = [line for line in report.splitlines() if line.startswith(f"| {kind} |")]
        assert row in text.splitlines()
    assert f"| **this model** | **{summary['perplexity']['pruned']:.2f}** |" in text.splitlines()
    assert summary["model"] not in text and Path(summary["model"]).name in text


def test_a_finished_run_is_pushed_and_not_run_again(hub: HubServer, finished: Path, command: Command) -> None:
    os.environ["HF_TOKEN"] = TOKEN
    stale = {"model-00001-of-00002.safetensors": b"old", "model.safetensors": b"old", "notes.txt": b"mine"}
    hub.repositories[NAME] = Repository("public", dict(stale))
    before = read_events(finished)
    outcome = command("--resume", "run", *PUSH)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"run run is finished: see runs/run/report.html\npushed: {hub.url}/{NAME}\n"
    assert hub.repositories[NAME].files == {"notes.txt": b"mine", **read_files(finished / "model")}
    assert hub.repositories[NAME].visibility == "public"
    events = read_events(finished)
    assert events[:-1] == before and events[-1]["type"] == "pushed"


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ((500, "no: {token}"), "Server error '500 Internal Server Error'"),
        ((403, "the token {token} may not write"), "the token [key] may not write"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_pushed_later(
    broken: tuple[int, str], said: str, hub: HubServer, flags: list[str], tmp_path: Path, command: Command
) -> None:
    os.environ["HF_TOKEN"] = TOKEN
    hub.broken = broken
    outcome = command(*flags, *PUSH)
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert outcome.err.startswith(f"not pushed to {NAME}: ") and said in outcome.err
    later = f"python -m graph.run --resume run --push-to-hub {NAME}"
    assert outcome.err.endswith(f"; the run is whole; push it later with: {later}\n")
    assert hub.tokens == {TOKEN} and TOKEN not in outcome.out + outcome.err
    for path in (tmp_path / "runs").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    hub.broken = None
    assert command(*later.split()[3:]).code == 0
    assert hub.repositories[NAME].files == read_files(tmp_path / "runs" / "run" / "model")


def test_a_hub_that_is_not_there(
    hub: HubServer, finished: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ["HF_TOKEN"] = TOKEN
    with HubServer() as gone:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone.url)
    outcome = command("--resume", "run", *PUSH)
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert outcome.err.startswith(f"not pushed to {NAME}: ") and "Connection refused" in outcome.err


def test_ctrl_c_while_it_is_pushed(
    hub: HubServer, finished: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ["HF_TOKEN"] = TOKEN

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.HfApi, "upload_folder", interrupt)
        outcome = command("--resume", "run", *PUSH)
    assert outcome.code == 1 and outcome.err.startswith(f"not pushed to {NAME}: interrupted; the run is whole; ")
    assert command("--resume", "run", *PUSH).code == 0, "the lock of the run is given back"


def test_a_login_stands_for_the_variable(
    hub: HubServer, finished: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finished.parent / "token").write_text(TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(finished.parent / "token"))
    hub.broken = (403, "the token {token} may not write")
    outcome = command("--resume", "run", *PUSH)
    assert hub.tokens == {TOKEN}
    assert outcome.code == 1 and "the token [key] may not write" in outcome.err and TOKEN not in outcome.err


def test_a_run_whose_model_is_gone(hub: HubServer, finished: Path, command: Command) -> None:
    os.environ["HF_TOKEN"] = TOKEN
    shutil.rmtree(finished / "model")
    outcome = command("--resume", "run", *PUSH)
    assert (outcome.code, hub.requests) == (2, [])
    assert outcome.err == (
        "error: runs/run/model/README.md is missing; put it back as it was, or make the run again with --config "
        "runs/run/config.yaml\n"
    )


@pytest.mark.parametrize("name", ["tiny-pruned", "me/tiny/pruned", "me/ti ny", "", "/tiny", "me/tiny.git"])
def test_a_name_that_is_none_is_refused_before_any_work(
    name: str, hub: HubServer, flags: list[str], tmp_path: Path, command: Command
) -> None:
    os.environ["HF_TOKEN"] = TOKEN
    outcome = command(*flags, "--push-to-hub", name)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        f"error: --push-to-hub {name!r} is not of the form ORGANISATION/NAME, such as me/SmolLM2-135M-pruned\n"
    )
    assert (hub.requests, list(tmp_path.iterdir())) == ([], [])


def test_no_token_is_refused_before_any_work(
    hub: HubServer, flags: list[str], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    outcome = command(*flags, *PUSH)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "error: --push-to-hub needs a token that may write: set HF_TOKEN in the environment or in .env, or run: hf "
        "auth login\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_offline_is_refused_before_any_work(flags: list[str], tmp_path: Path, command: Command) -> None:
    outcome = command(*flags, *PUSH)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "error: --push-to-hub needs the network, but HF_HUB_OFFLINE is set; unset it, or push later\n"
    )
    assert list(tmp_path.iterdir()) == []
