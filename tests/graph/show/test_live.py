"""The live page: what is told to whom, and who is turned away."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

import graph.show.live
from graph.doors import FOREIGN_HOST, FOREIGN_ORIGIN, STUDIO
from graph.show.live import BAR, HEADERS, SCRIPT, Board, address, listen, make_page, serve
from graph.show.words import Event
from tools.base.errors import UserError
from tools.base.files import write_json
from tools.base.made import FORMAT
from tools.base.rundir import append_event

TRIAL = {
    **{"type": "trial", "iteration": 1, "checkpoint": "c1", "sparsity": 0.3, "perplexity": 12.0, "kl": 0.1},
    **{"kl_error": 0.01, "predicted_kl": 0.1, "verdict": "accept", "reason": "<b>good</b>", "plan": "wanda to 30%"},
}


class Terminal:
    """The display that the page stands beside."""

    def __init__(self) -> None:
        self.shown: list[Event] = []

    def show(self, event: Event) -> None:
        self.shown.append(event)

    def ask(self, question: Event) -> str:
        return f"accept {question['iteration']}"


class Live(NamedTuple):
    """A page being served."""

    board: Any
    url: str
    terminal: Terminal
    client: httpx.Client

    def tell(self, event: dict[str, Any]) -> None:
        """An event of the run, as the session records and streams it."""
        append_event(self.board.directory, event)
        self.board.show(event)


def begin(directory: Path) -> None:
    """What a run writes first."""
    config = {"model": "my-model", "target_sparsity": 0.5}
    write_json(directory / "config.yaml", config)
    write_json(directory / "run.json", {"format": FORMAT, "config": config})


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    monkeypatch.setattr(graph.show.live, "LOOK_SECONDS", 0.02)
    begin(tmp_path)
    terminal = Terminal()
    with (
        listen(0) as listener,
        serve(tmp_path, listener, terminal) as board,
        httpx.Client(base_url=address(listener), trust_env=False, timeout=60) as client,
    ):
        yield Live(board, address(listener), terminal, client)


def read_told(answer: httpx.Response) -> Iterator[dict[str, str]]:
    """The fields of every event of a stream that has a name."""
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "event" in fields:
            yield fields
            fields = {}


def test_the_page_is_the_report_with_a_line_and_a_script(live: Live) -> None:
    answer = live.client.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert HEADERS.items() <= {name.title(): value for name, value in answer.headers.items()}.items()
    assert "my-model" in answer.text
    assert BAR.format(page=live.board.page, line="") in answer.text
    assert answer.text.count("<script>") == 1 and f"<script>{SCRIPT}</script></body>" in answer.text
    assert "http-equiv" not in answer.text, "the report's own policy would forbid the script"


def test_a_reload_shows_everything_so_far(live: Live) -> None:
    live.tell({"type": "node", "node": "validate", "iteration": 1})
    live.tell(TRIAL)
    live.tell({"type": "progress", "label": "validation", "done": 2, "total": 8})
    first, second = (live.client.get("/").text for _ in range(2))
    assert first == second
    assert "wanda to 30%" in first and "&lt;b&gt;good&lt;/b&gt;" in first and "<b>good" not in first
    assert BAR.format(page=live.board.page, line="iteration 1: validate · validation: 2 of 8") in first
    assert [event["type"] for event in live.terminal.shown] == ["node", "trial", "progress"]


def test_a_reader_is_told_what_changes(live: Live) -> None:
    with live.client.stream("GET", "/events", params={"page": live.board.page}) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        told = read_told(answer)
        live.tell({"type": "node", "node": "profile", "iteration": 0})
        assert next(told) == {"retry": "1000", "event": "line", "data": '"profile"'}
        live.tell({"type": "progress", "label": "gradients", "done": 1, "total": 4})
        assert next(told) == {"event": "line", "data": json.dumps("profile · gradients: 1 of 4")}
        live.tell(TRIAL)
        page = next(told)
        assert (page["event"], page["id"]) == ("page", live.board.page)
        assert json.loads(page["data"]) == live.client.get("/").text
        assert next(told) == {"event": "line", "data": json.dumps("profile · gradients: 1 of 4")}


def test_a_reader_that_comes_back_is_told_what_it_missed(live: Live) -> None:
    old = live.board.page
    live.tell(TRIAL)
    for headers, page in (({"Last-Event-ID": old}, live.board.page), ({}, old)):
        with live.client.stream("GET", "/events", params={"page": page}, headers=headers) as answer:
            told = next(read_told(answer))
            assert (told["event"], told["id"]) == ("page", live.board.page)
            assert "wanda to 30%" in json.loads(told["data"])


def test_no_two_processes_have_a_page_of_the_same_id(tmp_path: Path) -> None:
    assert Board(tmp_path, Terminal()).page != Board(tmp_path, Terminal()).page


def test_it_can_only_be_read(live: Live) -> None:
    for path in ("/", "/events"):
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"):
            answer = live.client.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, "GET"), (method, path)


def test_there_is_nothing_else(live: Live) -> None:
    assert live.client.get("/events.jsonl").status_code == live.client.get("/../config.yaml").status_code == 404


def test_a_foreign_name_is_turned_away(live: Live) -> None:
    port = live.url.rsplit(":")[-1].strip("/")
    for path in ("/", "/events"):
        for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "0.0.0.0", ""):
            answer = live.client.get(path, headers={"Host": host})
            assert (answer.status_code, answer.text) == (400, f"{FOREIGN_HOST}\n"), host
    assert live.client.get("/", headers={"Host": f"localhost:{port}"}).status_code == 200


def test_a_page_of_another_origin_is_turned_away(live: Live) -> None:
    for path in ("/", "/events"):
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1", STUDIO):
            for method in ("GET", "POST", "OPTIONS"):
                answer = live.client.request(method, path, headers={"Origin": origin})
                assert (answer.status_code, answer.text) == (403, f"{FOREIGN_ORIGIN}\n"), (method, path, origin)
                assert not [name for name in answer.headers if name.startswith("access-control")]
    assert live.client.get("/", headers={"Origin": live.url.rstrip("/")}).status_code == 200


def test_only_this_machine_can_reach_it(live: Live) -> None:
    assert live.url.startswith("http://127.0.0.1:")
    with listen(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_the_last_page_is_told_and_then_nothing_listens(tmp_path: Path) -> None:
    begin(tmp_path)
    told: list[dict[str, str]] = []
    ready = threading.Event()

    def read(url: str) -> None:
        with httpx.Client(trust_env=False, timeout=60) as client, client.stream("GET", f"{url}events") as answer:
            for event in read_told(answer):
                told.append(event)
                ready.set()

    with listen(0) as listener:
        url = address(listener)
        with serve(tmp_path, listener, Terminal()) as board:
            reader = threading.Thread(target=read, args=(url,))
            reader.start()
            assert ready.wait(60)
            append_event(tmp_path, TRIAL)
            board.show(TRIAL)
        reader.join(60)
    pages = [json.loads(event["data"]) for event in told if event["event"] == "page"]
    assert "wanda to 30%" in pages[-1]
    assert told[-1] == {"event": "line", "data": '"The run\'s process has ended; this is how it stood."'}
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)
    assert not [thread for thread in threading.enumerate() if thread.name == "page"]


def test_a_person_is_asked_in_the_terminal(tmp_path: Path) -> None:
    board = Board(tmp_path, Terminal())
    assert board.ask({"iteration": 3}) == "accept 3"
    assert board.line == "A plan waits for a person, in the terminal."


def test_events_of_an_unexpected_shape_end_nothing(tmp_path: Path) -> None:
    board = Board(tmp_path, terminal := Terminal())
    for event in ({}, {"type": "node"}, {"type": "progress", "label": "x", "done": "many"}):
        board.show(event)
    assert (board.line, len(terminal.shown)) == ("", 3)


def test_a_directory_that_cannot_be_shown_is_told(tmp_path: Path) -> None:
    page = make_page(tmp_path / "<gone>", "1-0", "a <line>")
    assert "&lt;gone&gt; holds no run" in page and "<gone>" not in page
    assert BAR.format(page="1-0", line="a &lt;line&gt;") in page


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError) as refusal:
            listen(port)
    assert str(refusal.value) == (
        f"--serve cannot listen at port {port}: Address already in use; give another, or 0 for any"
    )
