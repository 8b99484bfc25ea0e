"""Runs and comparisons on named texts: every figure is told for each, judged by their sum, resumed and replayed."""

import json
from pathlib import Path

import pytest
import yaml

from tests.comparisons import make_settings, run_comparison
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    TINY,
    Halt,
    assert_same_weights,
    fork,
    read_events,
    read_run_config,
    read_summary,
    read_trials,
    run_apart,
)
from tests.named import flag_texts, name_texts
from tests.openai_server import OpenAIServer
from tools.results.sentences import list_outcome
from tools.workbench.open import close_workbench

pytestmark = pytest.mark.figures

MORE = ("--target-sparsity", "0.5", "--max-iterations", "4", "--tau", "9")


@pytest.fixture(scope="module")
def naming(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    texts = flag_texts(tmp_path_factory.mktemp("texts"))
    return ["--name", "run", "--model", str(tiny_llama), *TINY, *MORE, *texts]


@pytest.fixture(scope="module")
def named(naming: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing happened to."""
    return run_apart(tmp_path_factory.mktemp("named"), *naming)


def test_every_figure_is_told_for_each_text(named: Path) -> None:
    trials, summary = read_events(named, "trial"), read_summary(named)
    assert [[text["name"] for text in trial["texts"]] for trial in trials] == [["code", "prose"]] * len(trials)
    for trial in trials[1:]:
        code, prose = trial["texts"]
        assert trial["kl"] == pytest.approx(0.75 * code["kl"] + 0.25 * prose["kl"], rel=1e-9)
        assert code["change_error"] > 0 and prose["change_error"] > 0
    kept = trials[summary["kept"]]
    for text, figures in zip(summary["texts"], kept["texts"], strict=True):
        assert [text[key] for key in ("name", "weight", "kl", "kl_error")] == [
            figures[key] for key in ("name", "weight", "kl", "kl_error")
        ]
        assert text["dense"] > 0 and text["pruned"] > 0 and text["uniform_wanda"] > 0
    assert summary["protocol"]["tokens"] == 2 * 2 * 64
    code = summary["texts"][0]
    row = f"| code | file:code.jsonl | 75% | {code['dense']:.2f} | **{code['pruned']:.2f}** |"
    for name in ("report.md", "model/README.md"):
        assert row in (named / name).read_text(), name
    report = (named / "report.md").read_text()
    assert "| # | sparsity | perplexity | KL | KL code | KL prose | predicted KL | verdict | plan | why |" in report
    assert "Figures are means over 2 texts (75% code, 25% prose)." in report
    assert str(named.parent) not in (named / "model" / "README.md").read_text()
    page = (named / "report.html").read_text()
    assert "<h2>Texts</h2>" in page and f"<dt>KL on prose</dt><dd>{kept['texts'][1]['kl']:.4f}" in page
    (line,) = [x for x in list_outcome({**summary, "model_directory": "", "report": ""}) if x.startswith("texts: ")]
    assert line.startswith(
        f"texts: code KL {code['kl']:.4f} ± {code['kl_error']:.4f}, perplexity {code['pruned']:.2f}; p"
    )


def test_tokens_are_those_of_all_texts(named: Path) -> None:
    trials, config = read_events(named, "trial"), read_run_config(named)
    assert trials[0]["tokens"] == config.validation_tokens == 2 * 3 * 64


@pytest.mark.parametrize(
    "halt",
    [
        Halt("profile", "tools.statistics.walks:Walks.gradients", 2),
        Halt("profile", "tools.measure.losses:heed_stop", 4, kind="stop"),
        Halt("validate", "tools.measure.losses:heed_stop", 3),
        Halt("finish", "tools.workbench.evaluate:Evaluator.evaluate", 1, after=True),
    ],
    ids=lambda halt: f"{halt.node}-{halt.kind}",
)
def test_interrupted_and_resumed_it_ends_the_same(
    halt: Halt, naming: list[str], named: Path, tmp_path: Path, command: Command
) -> None:
    ended = fork(tmp_path, *naming, halt=halt).finish()
    assert ended.code == (1 if halt.kind == "stop" else -9), ended
    assert command("--resume", "run").code == 0
    run = tmp_path / "runs" / "run"
    assert read_trials(run) == read_trials(named)
    assert read_summary(run)["mask_sha256"] == read_summary(named)["mask_sha256"]
    assert_same_weights(run, named)


def test_replayed_it_is_the_same(naming: list[str], named: Path, tmp_path: Path, command: Command) -> None:
    assert command(*naming).code == 0
    outcome = command("--replay", "run", "--name", "again")
    assert (outcome.code, "parts from the record" in outcome.out) == (0, False)
    again = read_summary(tmp_path / "runs" / "again")
    assert again["mask_sha256"] == read_summary(named)["mask_sha256"] and again["texts"] == read_summary(named)["texts"]


def test_a_config_file_names_texts_as_a_mapping(
    tiny_llama: Path, named: Path, tmp_path: Path, command: Command
) -> None:
    texts = read_run_config(named).model_dump(include={"text", "text_weights"})
    (tmp_path / "texts.yaml").write_text(yaml.safe_dump(texts))
    flags = ["--name", "run", "--model", str(tiny_llama), *TINY, *MORE]
    assert command(*flags, "--config", "texts.yaml").code == 0
    assert read_summary(tmp_path / "runs" / "run")["mask_sha256"] == read_summary(named)["mask_sha256"]


def test_recipes_are_compared_by_each_text(tiny_llama: Path, tmp_path: Path, no_plot: None, command: Command) -> None:
    texts = name_texts(tmp_path)
    settings = make_settings(
        tiny_llama, tmp_path / "out", recipes="refit:kappa,wanda:evolution", sparsity="0.5", **texts
    )
    known, lines = run_comparison(settings)
    for row in known.rows:
        code, prose = row.texts
        assert row.kl == pytest.approx(0.75 * code.kl + 0.25 * prose.kl, rel=1e-9)
    told = known.rows[0].texts[0]
    assert f"(code KL {told.kl:.4f} ± {told.kl_error:.4f}, perplexity {told.perplexity:.2f}; prose KL " in lines[1]
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "| perplexity | × SparseGPT | KL | KL code | KL prose | behind the first | prune s |" in table
    assert (
        f"192 tokens of each of code (`{texts['text']['code']}`, weight 3), prose (`{texts['text']['prose']}`" in table
    )
    heads = (tmp_path / "out" / "compare.csv").read_text().splitlines()[0]
    assert heads.endswith(",perplexity code,kl code,kl_error code,perplexity prose,kl prose,kl_error prose")
    close_workbench()
    again, _ = run_comparison(settings)
    assert json.loads(again.model_dump_json()) == json.loads(known.model_dump_json())


def test_a_dry_run_says_what_a_planner_may_have_written(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    given = ("--dry-run", "--model", str(tiny_llama), *TINY, *flag_texts(tmp_path), "--goal", "Calls.")
    outcome = command(*given, "--goal-tokens", "2000", "--tasks", "mmlu,freebaseqa")
    assert outcome.code == 0
    assert outcome.out.rstrip().splitlines()[-1] == (
        "not counted: mmlu, freebaseqa; up to 3 texts of 576 tokens that a planner may ask for"
    )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--text", "a=pydoc", "--test", "self"), "text names texts in place of test; give the one or the other"),
        (("--text", "a=pydoc", "--text", "a=self"), "text: the name 'a' is given twice, not "),
        (("--text", "a=file:nowhere.txt"), "text file nowhere.txt does not exist"),
        (("--text", "a=self:A | B"), "the a calibration and a validation and a test texts come from 2 prompts of one"),
        (("--text", "a=pydoc", "--text-weights", "b=1"), "text_weights weigh 'b', which is none of the texts a"),
        (("--text-weights", "b=1"), "text_weights weigh named texts, and there are none; name them with text"),
    ],
)
def test_bad_input_is_one_line(tiny_llama: Path, flags: tuple[str, ...], line: str, command: Command) -> None:
    outcome = command("--model", str(tiny_llama), *flags)
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert outcome.err.startswith(f"error: {line}") and outcome.err.count("\n") == 1, outcome.err


def test_too_short_a_text_is_one_line(tiny_llama: Path, command: Command) -> None:
    outcome = command("--model", str(tiny_llama), "--text", "manual=pydoc", "--test-windows", "60000")
    line = (
        "error: text source 'pydoc' is too short: 16 manual calibration + 8 manual validation + 60000 manual test wind"
    )
    assert outcome.code == 2 and outcome.err.startswith(line) and outcome.err.count("\n") == 1


@pytest.mark.usefixtures("raw_gamma")
def test_a_plan_mixes_texts_as_it_likes_and_is_replayed(
    naming: list[str], named: Path, tmp_path: Path, command: Command
) -> None:
    recipes = [{}, {"mix": {"code": 1, "prose": 0}}, {"mix": {"code": 3, "prose": 1}}, {"mix": {"code": 1, "prose": 9}}]
    plans = [{"sparsity": 0.5, "recipe": {"allocation": "uniform", **recipe}} for recipe in recipes]
    with OpenAIServer(plans) as server:
        assert command(*naming, "--planner", server.planner("p"), "--planner-calls", "0", "--patience", "9").code == 0
        assert "Weights of texts." in json.dumps(server.requests[0].body)
    run = tmp_path / "runs" / "run"
    trials = read_events(run, "trial")
    assert [trial["plan"] for trial in trials[1:3]] == ["50.0% refit:uniform", "50.0% refit~1code:uniform"]
    code, prose = ([trial["texts"][place]["kl"] for trial in trials[1:]] for place in (0, 1))
    assert code[1] < code[0] and prose[1] > prose[0], "what is fitted to code alone keeps more of it"
    assert command("--replay", "run", "--name", "again").code == 0
    again = tmp_path / "runs" / "again"
    assert read_trials(again) == read_trials(run)
    assert read_summary(again)["mask_sha256"] == read_summary(run)["mask_sha256"]


def test_rows_of_a_table_are_of_other_mixtures(
    tiny_llama: Path, tmp_path: Path, no_plot: None, command: Command
) -> None:
    recipes = "refit~1code:uniform,refit~1prose~sequential:uniform,refit:kappa"
    settings = make_settings(tiny_llama, tmp_path / "out", recipes=recipes, sparsity="0.5", **name_texts(tmp_path))
    known, _ = run_comparison(settings)
    assert [row.recipe for row in known.rows] == recipes.split(",")
    code, prose, both = ({text.name: text.kl for text in row.texts} for row in known.rows)
    assert code["code"] < prose["code"] and prose["prose"] < code["prose"] and both["code"] > 0
