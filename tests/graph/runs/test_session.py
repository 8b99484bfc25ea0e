"""What a node tells the run's log."""

from contextvars import copy_context
from pathlib import Path

from graph.runs.session import AT_WORK, Session, read_logged
from tools.base.rundir import scan_events


def test_a_node_tells_only_what_it_has_not_told_before_a_kill(tmp_path: Path) -> None:
    def enter_node(node: str, checkpoint: str) -> Session:
        session = Session(tmp_path, lambda _event: None, 0.0, logged=read_logged(tmp_path, node, checkpoint))
        session.emit("node", node=node, checkpoint=checkpoint)
        return session

    def tell(session: Session, *texts: str) -> None:
        for text in texts:
            session.emit("note", text=text)

    tell(enter_node("profile", "0"), "a")
    tell(enter_node("plan", "1"), "a", "b")
    tell(enter_node("plan", "1"), "a")
    with (tmp_path / "events.jsonl").open("a") as log:
        log.write('{"time": 1785000000.1, "type": "note", "text": "c')  # a kill cut it short
    tell(enter_node("plan", "1"), "a", "b", "b", "c", "é 3.0e-05")
    again = enter_node("plan", "1")
    at_work = copy_context()
    at_work.run(AT_WORK.set, True)
    at_work.run(tell, again, "a")  # a task that is done again: a second time
    tell(enter_node("plan", "2"), "a")
    tell(enter_node("plan", ""), "a")
    tell(enter_node("plan", ""), "a")
    told = [event.get("text", f" {event.get('checkpoint')}:") for _, event in scan_events(tmp_path, "node", "note")]
    assert "".join(told) == " 0:a 1:ab 1: 1:bcé 3.0e-05 1:a 2:a :a :a"
