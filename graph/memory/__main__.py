"""What one run taught, for the next ones: lessons, what levers did to KL, and notes, in the LangGraph store.

python -m graph.memory list
python -m graph.memory show MODEL
python -m graph.memory forget MODEL [--run RUN] [--yes]
"""

import argparse
import difflib
import os
import sys

from langgraph.store.base import BaseStore, SearchItem

from graph.memory.experience import average, order_row
from graph.memory.lessons import EXPERIENCE, LESSONS, NOTES, ROOMS, delete_items, find_models, group_items, runs_of
from graph.persistence import STATE_VARIABLE, explain_damaged_state, open_store, state_url
from graph.persistence.sqlite import database
from graph.planning.past import count_rounds, list_rows
from graph.reflecting.schema import Lesson, Note, Tried
from tools.base.errors import UserError
from tools.base.options import Parser, refuse
from tools.base.rundir import RUNS_DIR_VARIABLE, runs_directory
from tools.base.secrets import read_secrets
from tools.base.words import clean, count

WORDS = {EXPERIENCE: "trial", NOTES: "note"}
"""What items are called, beside lessons."""


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 2 bad input."""
    try:
        read_secrets()
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        for variable, value in ((RUNS_DIR_VARIABLE, options.runs_dir), (STATE_VARIABLE, options.state)):
            if value:
                os.environ[variable] = value
        place = "PostgreSQL" if state_url() else str(runs_directory())
        if not state_url() and not database(runs_directory()).is_file():  # looking makes no file
            if options.command != "list":
                raise UserError(f"there are no lessons in {place}")
            print(f"no lessons in {place}")
            return 0
        with explain_damaged_state(runs_directory()), open_store(runs_directory()) as store:
            _obey(store, options, place)
    except UserError as error:
        return refuse(error)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m graph.memory", description=(__doc__ or "").splitlines()[0])
    common = Parser(add_help=False)
    common.add_argument("--runs-dir", metavar="DIR", help=f"Where runs are kept; ${RUNS_DIR_VARIABLE} or runs/.")
    common.add_argument(
        "--state", metavar="URL", help=f"The PostgreSQL database that runs keep their state in; ${STATE_VARIABLE}."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", parents=[common], help="Models with lessons, and how many.")
    show = commands.add_parser("show", parents=[common], help="The lessons about a model.")
    forget = commands.add_parser("forget", parents=[common], help="Delete what is known about a model.")
    for command in (show, forget):
        command.add_argument("model", metavar="MODEL", help="As in the list.")
    forget.add_argument("--run", help="Only what this run taught.")
    forget.add_argument("--yes", action="store_true", help="Without it, only what would be forgotten is said.")
    return parser.parse_args(arguments)


def _obey(store: BaseStore, options: argparse.Namespace, place: str) -> None:
    models = find_models(store, *ROOMS)
    if options.command == "list":
        for name, items in models.items():
            print(_describe_model(name, items))
        if not models:
            print(f"no lessons in {place}")
        return
    items = _pick(models, options.model, "model")
    if options.command == "show":
        print(_describe_model(options.model, items))
        for lesson, _ in group_items(_take(items, LESSONS)):
            print(f"  {_describe_lesson(lesson)}")
        tried = sorted(average(Tried.model_validate(item.value) for item in _take(items, EXPERIENCE)), key=order_row)
        for line in list_rows(tried):
            print(f"  {clean(line, 300)}")
        for item in _take(items, NOTES):
            note = Note.model_validate(item.value)
            print(f"  note of {clean(note.run)}, {count_rounds(note)}: {clean(note.text, 400)}")
        return
    by_run = {run: [item for item in items if item.value["run"] == run] for run in runs_of(items)}
    chosen = items if options.run is None else _pick(by_run, options.run, "run")
    told = f"{count(len(chosen), 'observation')} about {clean(options.model)} from {count(len(runs_of(chosen)), 'run')}"
    if not options.yes:
        print(f"would forget {told}; add --yes to do it")
        return
    delete_items(store, chosen)
    print(f"forgot {told}")


def _pick(known: dict[str, list[SearchItem]], name: str, what: str) -> list[SearchItem]:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "; see python -m graph.memory list"
    raise UserError(f"no lessons of {what} {name!r}{hint}")


def _describe_model(model: str, items: list[SearchItem]) -> str:
    told = [count(len(group_items(_take(items, LESSONS))), "lesson")]
    told += [count(len(kept), word) for room, word in WORDS.items() if (kept := _take(items, room))]
    return f"{clean(model)}: {', '.join(told)} from {count(len(runs_of(items)), 'run')}"


def _take(items: list[SearchItem], room: str) -> list[SearchItem]:
    return [item for item in items if item.namespace[0] == room]


def _describe_lesson(lesson: Lesson) -> str:
    seen = f"{count(lesson.count, 'observation')}, confidence {lesson.confidence:.2f}"
    ground = f" {clean(lesson.ground, 300)}" if lesson.ground else ""
    figures = f"{clean(lesson.selector)} ×{lesson.factor:.2f} with {clean(lesson.recipe) or 'any recipe'}{ground}"
    return f"{figures} ({seen}): {clean(lesson.text, 400)}"


if __name__ == "__main__":
    sys.exit(main())
