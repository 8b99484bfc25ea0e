"""`python -m tools.evaluate`: the figures, what is kept, what is refused."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.rows import write_rows
from tests.tiny import save_tiny_gguf, save_tiny_model
from tools.base.rundir import unlock_run
from tools.evaluate import main
from tools.experiments import evaluation
from tools.results.evaluation import Figures

Models = tuple[str, str]


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A directory and a .gguf file."""
    return str(tiny_llama), str(save_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", seed=1))


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """FreebaseQA with two exemplars and four questions."""
    rows = [{"question": f"Who is {i}?", "answer": f"the {i}"} for i in range(6)]
    source = write_rows(tmp_path / "qa.jsonl", rows)
    options = ("--tasks", "freebaseqa", "--freebaseqa", source, "--shots", "2", "--device", "cpu")
    return [*options, "--out", str(tmp_path / "out")]


def run(*arguments: str) -> int:
    """The command, as a process of its own would leave the directory."""
    try:
        return main(list(arguments))
    finally:
        unlock_run(Path(arguments[arguments.index("--out") + 1]))


def test_models_with_other_tokenizers_stand_beside_one_another_without_a_difference(
    models: Models, flags: list[str], tmp_path: Path
) -> None:
    other = save_tiny_model(tmp_path / "other", "llama")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:0]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert run(models[0], str(other), *flags) == 0
    page = (tmp_path / "out" / "evaluate.md").read_text()
    lines = {(line["metric"], line["model"]): line for line in read_table(tmp_path / "out" / "evaluate.csv")}
    assert lines["logprob", str(other)]["value"] and lines["logprob", str(other)]["difference"] == ""
    assert "answer_tokens" in page and run(models[0], *flags) == 0, "and it goes on from there"


def read_table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_figures_of_two_models_and_their_paired_differences(
    models: Models, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*models, *flags) == 0
    known = Figures.model_validate_json((tmp_path / "out" / "evaluate.json").read_bytes())
    assert [(row.model, row.task) for row in known.rows] == [(model, "freebaseqa") for model in models]
    first, second = (row.results[1] for row in known.rows)
    assert (first.score.model, second.score.model) == models and len(first.values) == len(second.values) == 4
    gaps = [after - before for before, after in zip(first.values, second.values, strict=True)]
    mean = sum(gaps) / 4
    error = (sum((gap - mean) ** 2 for gap in gaps) / 3 / 4) ** 0.5

    table = read_table(tmp_path / "out" / "evaluate.csv")
    assert [(line["model"], line["metric"], line["samples"]) for line in table] == [
        (model, metric, "4") for metric in ("exact_match", "logprob") for model in models
    ]
    assert (table[2]["difference"], table[2]["paired"]) == ("", "")
    assert float(table[3]["difference"]) == pytest.approx(mean, abs=1e-9)
    assert float(table[3]["difference_error"]) == pytest.approx(error, abs=1e-9) and table[3]["paired"] == "True"

    out, err = capsys.readouterr()
    figure = f"{second.score.value:.4f} ± {second.score.error:.4f}"
    gap = f"{mean:+.4f} ± {error:.4f}"
    assert out.splitlines()[-2:] == [
        f"freebaseqa logprob: {figure} {models[1]}, 4 questions; {gap} to the first",
        f"see {tmp_path / 'out' / 'evaluate.md'}",
    ]
    assert [line for line in err.splitlines() if "GGUF" not in line and line] == [], "the harness says nothing"
    report = (tmp_path / "out" / "evaluate.md").read_text()
    assert f"| {figure} | {gap} | 4 |" in report
    assert "- task freebaseqa, version 1.0, shots 2, limit 0, data qa.jsonl " in report


def test_what_is_done_is_kept_when_it_is_stopped(
    models: Models,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[str] = []
    ask = evaluation.run_benchmark

    def stop_at_the_second(benchmark: Any, model: Any, tokenizer: Any, label: str, progress: Any) -> Any:
        asked.append(label)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(benchmark, model, tokenizer, label, progress)

    monkeypatch.setattr(evaluation, "run_benchmark", stop_at_the_second)
    assert run(*models, *flags) == 1
    stopped = "stopped; the rows that are done are kept, and the same command goes on\n"
    assert capsys.readouterr().err.endswith(stopped)
    first = json.loads((tmp_path / "out" / "evaluate.json").read_text())["rows"]
    assert len(first) == 1
    assert run(*models, *flags) == 0
    assert asked == [models[0], models[1], models[1]]
    assert json.loads((tmp_path / "out" / "evaluate.json").read_text())["rows"][0] == first[0]
    assert run(models[1], *flags) == 0 and len(asked) == 3, "nothing is asked twice"


def test_another_protocol_needs_another_directory(
    models: Models, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(models[0], *flags, "--limit", "1") == 0
    capsys.readouterr()
    assert run(models[0], *flags, "--limit", "2") == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'out'} holds figures of freebaseqa by another protocol (limit (1 and 2)); "
        "choose another --out\n"
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nowhere.gguf"], "model file nowhere.gguf does not exist"),
        (["model", "--tasks", ""], "no task is given; try --tasks mmlu,freebaseqa"),
        (["model", "--freebaseqa", "file:nowhere.jsonl"], "file of questions nowhere.jsonl does not exist"),
        (["model", "--limit", "-1"], "limit: input should be greater than or equal to 0, not '-1'"),
        (["model", "--task", "mmlu"], "unknown option '--task'; did you mean --tasks?"),
        ([], "the following arguments are required: MODEL"),
    ],
)
def test_bad_input_is_told_before_a_model_is_loaded(
    flags: list[str],
    tmp_path: Path,
    arguments: list[str],
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluation, "load_model", None)
    assert run(*flags, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {error}") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_rows_of_an_earlier_command_stay_behind_those_asked_for(
    models: Models, flags: list[str], tmp_path: Path
) -> None:
    third = str(save_tiny_model(tmp_path / "third", "gpt2"))
    for model in (models[0], third):
        assert run(model, *flags, "--limit", "1") == 0
    assert run(third, *flags, "--limit", "1") == 0
    rows = json.loads((tmp_path / "out" / "evaluate.json").read_text())["rows"]
    assert [row["model"] for row in rows] == [third, models[0]]


def test_a_model_that_is_another_since_is_asked_again(
    tiny_llama: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    assert run(str(model), *flags) == run(str(model), *flags) == 0
    assert "asked again" not in capsys.readouterr().out
    first = Figures.model_validate_json((tmp_path / "out" / "evaluate.json").read_bytes()).rows[0].results[1].values
    weights = load_file(model / "model.safetensors")
    save_file({name: 0.5 * weight for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    assert run(str(model), *flags) == 0
    assert f"{model} is another than when it was asked, and is asked again" in capsys.readouterr().out
    [row] = Figures.model_validate_json((tmp_path / "out" / "evaluate.json").read_bytes()).rows
    assert row.results[1].values != first


def test_a_model_that_does_not_fit_is_streamed(
    models: Models, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(models[0], *flags) == 0
    held = Figures.model_validate_json((tmp_path / "out" / "evaluate.json").read_bytes()).rows
    loaded: list[tuple[str, Path | None]] = []
    load = evaluation.load_model

    def note(settings: Any, scratch: Path | None = None) -> Any:
        loaded.append((settings.device, scratch))
        return load(settings, scratch)

    monkeypatch.setattr(evaluation, "load_model", note)
    monkeypatch.setattr("tools.models.load.count_free", lambda: 1000)
    other = [flag for flag in flags if flag not in ("--device", "cpu")][:-1]
    assert run(models[0], *other, str(tmp_path / "other"), "--device", "auto") == 0
    assert loaded == [("stream", tmp_path / "other")], "its files lie beside the figures, not where memory may be"
    streamed = Figures.model_validate_json((tmp_path / "other" / "evaluate.json").read_bytes()).rows
    assert [row.results for row in streamed] == [row.results for row in held]


def test_of_a_run_its_model_is_asked(tiny_llama: Path, flags: list[str], tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "runs" / "mine" / "model")
    (tmp_path / "runs" / "mine" / "events.jsonl").write_text("")
    assert run(str(tmp_path / "runs" / "mine"), *flags) == 0
    [row] = Figures.model_validate_json((tmp_path / "out" / "evaluate.json").read_bytes()).rows
    assert row.model == str(tmp_path / "runs" / "mine" / "model")
