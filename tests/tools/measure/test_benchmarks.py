"""Tasks of lm-evaluation-harness on tiny models: what is asked, what is measured, what is refused."""

import copy
import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.tiny import make_tiny_model, make_tiny_tokenizer, tiny_settings
from tools.base.errors import UserError
from tools.base.settings import TaskSettings
from tools.measure import benchmarks
from tools.measure.benchmarks import (
    Result,
    compare_scores,
    load_benchmarks,
    refuse_shared_questions,
    run_benchmark,
    subtract,
)
from tools.results.schema import Score

SUBJECTS = ("abstract_algebra", "us_foreign_policy")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions with answers, and an MMLU of two subjects with three exemplars and four questions each."""
    home = tmp_path_factory.mktemp("data")
    write_lines(home / "qa.jsonl", [{"question": f"Who is {i}?", "answers": [f"the {i}", str(i)]} for i in range(8)])
    write_lines(home / "mmlu" / "dev.jsonl", [make_choice(s, f"dev {i}") for s in SUBJECTS for i in range(3)])
    write_lines(home / "mmlu" / "test_4.jsonl", [make_choice(s, f"test {i}") for s in SUBJECTS for i in range(4)])
    return home


def make_choice(subject: str, question: str) -> dict[str, Any]:
    return {"subject": subject, "question": f" {question}? ", "choices": list("wxyz"), "answer": int(question[-1])}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_of(data: Path, tasks: str, **changes: Any) -> TaskSettings:
    options = {"tasks": tasks, "shots": 2, "freebaseqa": f"file:{data / 'qa.jsonl'}", "mmlu": f"file:{data / 'mmlu'}"}
    return TaskSettings.model_validate({**options, **changes})


def ask(data: Path, tasks: str, seed: int = 0, **changes: Any) -> tuple[Any, list[Result]]:
    """(the harness' task, its figures) of a tiny Llama."""
    (benchmark,) = load_benchmarks(settings_of(data, tasks, **changes), "fp32")
    results = run_benchmark(benchmark, make_tiny_model("llama", seed), make_tiny_tokenizer(), "tiny", ignore)
    return benchmark.task, results


def ignore(label: str, done: int, total: int) -> None:
    """No progress is shown."""


# What is asked


def test_freebaseqa_shows_the_first_questions_and_never_asks_them(data: Path) -> None:
    task, results = ask(data, "freebaseqa")
    prompts = list(dict.fromkeys(instance.args[0] for instance in task.instances))
    shown = "Question: Who is 0?\nAnswer: the 0\n\nQuestion: Who is 1?\nAnswer: the 1\n\n"
    assert prompts == [f"{shown}Question: Who is {i}?\nAnswer:" for i in range(2, 8)]
    assert [result.score.samples for result in results] == [6, 6]


def test_the_limit_takes_the_first_questions(data: Path) -> None:
    task, results = ask(data, "freebaseqa", limit=2, shots=0)
    assert [instance.args[0] for instance in task.instances][::2] == [f"Question: Who is {i}?\nAnswer:" for i in (0, 1)]
    assert [(result.score.samples, result.score.protocol["limit"]) for result in results] == [(2, 2), (2, 2)]


def test_mmlu_from_files_asks_as_the_harness_does(data: Path) -> None:
    from tools.measure.tasks.mmlu import TEMPLATES

    group, _ = ask(data, "mmlu")
    template = yaml.safe_load((TEMPLATES / "_default_template_yaml").read_text())
    for task, subject in zip(group.get_all_tasks(), SUBJECTS, strict=True):
        theirs = yaml.safe_load((TEMPLATES / f"mmlu_{subject}.yaml").read_text())
        assert (task.task_name, task.config.description) == (theirs["task"], theirs["description"])
        for field in ("doc_to_text", "doc_to_choice", "doc_to_target", "output_type"):
            assert getattr(task.config, field) == template[field]
    assert task.instances[0].args == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        "dev 0?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\n"
        "dev 1?\nA. w\nB. x\nC. y\nD. z\nAnswer: B\n\n"
        "test 0?\nA. w\nB. x\nC. y\nD. z\nAnswer:",
        " A",
    )


def test_every_subject_has_a_description_made_of_its_name() -> None:
    from tools.measure.tasks.mmlu import TEMPLATES

    files = sorted(TEMPLATES.glob("mmlu_*.yaml"))
    assert len(files) == 57
    for file in files:
        theirs, name = yaml.safe_load(file.read_text()), file.stem.removeprefix("mmlu_").replace("_", " ")
        assert theirs["description"] == f"The following are multiple choice questions (with answers) about {name}.\n\n"


def test_tasks_of_the_harness_are_asked_by_name_or_tag(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from lm_eval.tasks import TaskManager

    task = {
        **{"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data / "mmlu" / "test_4.jsonl")}}},
        **{"output_type": "multiple_choice", "test_split": "test", "fewshot_split": "test", "tag": "toys"},
        **{"doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "answer"},
    }
    for name, more in {"toy": {}, "zero_toy": {"num_fewshot": 0}}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task, **more}))
    few = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(benchmarks, "_index_tasks", lambda: few)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    by_tag, results = ask(data, "toys")
    assert [(result.score.task, result.score.metric, result.score.samples) for result in results] == [
        (name, metric, 8) for name in ("toy", "zero_toy") for metric in ("acc", "acc_norm")
    ]
    assert [leaf.config.num_fewshot for leaf in by_tag] == [2, 0]
    assert len(by_tag[0].instances[0].args[0].split("?")) == 4 and by_tag[1].instances[0].args[0] == " test 0? "
    _, (alone, _) = ask(data, "zero_toy")
    assert alone.values == results[2].values and alone.score.protocol["shots"] == 0


# What is measured


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (" The Beatles.", "beatles"),
        ("beyoncé", "beyonce"),
        ("A  man, a Plan!", "man plan"),
        ("Rock 'n' Roll", "rock n roll"),
        ("theatre", "theatre"),
        ("AC/DC", "acdc"),
    ],
)
def test_answers_are_compared_without_case_accents_punctuation_and_articles(said: str, kept: str) -> None:
    from tools.measure.tasks.freebaseqa import normalize

    assert normalize(said) == kept


def test_any_of_the_answers_is_right_and_the_gold_one_is_weighed_per_token(data: Path) -> None:
    (benchmark,) = load_benchmarks(settings_of(data, "freebaseqa"), "fp32")
    task, doc = benchmark.task, {"question": "Who is 3?", "answer": "the 3", "answers": ["the 3", "three"]}
    task.tokens = {"Who is 3?": 4}
    assert task.process_results(doc, [" Three.", (-6.0, False)]) == {"exact_match": 1.0, "logprob": -1.5}
    assert task.process_results(doc, [" three or four", (-6.0, False)])["exact_match"] == 0.0


def test_the_log_probability_is_the_models_own(data: Path) -> None:
    _, (_, logprob) = ask(data, "freebaseqa")
    model, tokenizer = make_tiny_model("llama"), make_tiny_tokenizer()
    shown = "Question: Who is 0?\nAnswer: the 0\n\nQuestion: Who is 1?\nAnswer: the 1\n\n"
    expected, tokens = [], 0
    for i in range(2, 8):
        context = tokenizer(f"{shown}Question: Who is {i}?\nAnswer:")["input_ids"]
        ids = torch.tensor([context + tokenizer(f" the {i}")["input_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        gold = logprobs.gather(1, ids[0, 1:, None])[len(context) - 1 :]
        expected.append(float(gold.mean()))
        tokens += len(gold)
    assert logprob.score.metric == "logprob" and logprob.score.protocol["answer_tokens"] == tokens
    assert logprob.values == pytest.approx(expected, abs=1e-4)
    assert logprob.score.value == pytest.approx(sum(expected) / 6, abs=1e-4)
    assert logprob.score.error == pytest.approx(float(torch.tensor(expected).std()) / 6**0.5, abs=1e-4)


def test_mmlu_is_the_mean_over_all_questions(data: Path) -> None:
    _, (acc,) = ask(data, "mmlu")
    assert (acc.score.task, acc.score.metric, acc.score.samples) == ("mmlu", "acc", 8)
    assert set(acc.values) <= {0.0, 1.0} and acc.score.value == sum(acc.values) / 8
    assert acc.score.error is not None


def test_batches_change_rounding_alone_and_the_model_stays_as_it_was(data: Path) -> None:
    (benchmark,) = load_benchmarks(settings_of(data, "freebaseqa", batch_size=3), "fp32")
    model, tokenizer = make_tiny_model("llama"), make_tiny_tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps: list[tuple[str, int, int]] = []
    batched = run_benchmark(benchmark, model, tokenizer, "tiny", lambda *step: steps.append(step))
    _, single = ask(data, "freebaseqa")
    assert batched[1].values == pytest.approx(single[1].values, abs=1e-4)
    assert batched[1].score.protocol["batch_size"] == 3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert steps == [("freebaseqa, tiny", i, 12) for i in range(1, 13)]


def test_the_tokenizer_gets_no_padding_token(data: Path) -> None:
    (benchmark,) = load_benchmarks(settings_of(data, "freebaseqa", limit=1), "fp32")
    tokenizer = copy.deepcopy(make_tiny_tokenizer())
    tokenizer.pad_token = None
    run_benchmark(benchmark, make_tiny_model("llama"), tokenizer, "tiny", ignore)
    assert tokenizer.pad_token is None


def test_prompts_that_are_too_long_are_counted(data: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "long.jsonl", [{"question": f"{i} " * 150, "answer": "a"} for i in range(3)])
    _, results = ask(data, "freebaseqa", freebaseqa=f"file:{file}")
    assert results[0].score.protocol["cut_prompts"] == 2  # the one question left, for both metrics
    told: list[str] = []
    benchmarks.warn_of_cut_prompts(results, told.append)
    assert told == ["freebaseqa: 2 prompts are longer than tiny reads and lost their beginning"]


def test_a_model_that_computes_nothing_finite_has_no_figure(data: Path) -> None:
    (benchmark,) = load_benchmarks(settings_of(data, "freebaseqa", limit=2), "fp32")
    model = make_tiny_model("llama")
    model.model.norm.weight.fill_(float("nan"))
    match, logprob = run_benchmark(benchmark, model, make_tiny_tokenizer(), "broken", ignore)
    assert match.score.value == 0.0
    assert (logprob.score.value, logprob.score.error, logprob.values) == (None, None, [])


# The protocol


def test_the_protocol_says_all_that_figures_must_share(data: Path) -> None:
    _, (first, second) = ask(data, "freebaseqa")
    protocol = first.score.protocol
    assert list(protocol) == [
        *("task", "version", "shots", "limit", "data", "dtype", "batch_size", "chat_template", "seed", "versions"),
        *("prompts_sha256", "cut_prompts"),
    ]
    assert protocol["data"] == {"qa.jsonl": benchmarks.hash_file(data / "qa.jsonl")}
    assert list(protocol["versions"]) == ["torch", "transformers", "lm-eval", "datasets"]
    assert second.score.protocol == {**protocol, "answer_tokens": second.score.protocol["answer_tokens"]}


def make_score(model: str, **protocol: Any) -> Score:
    versions = {"torch": "2.9", "lm-eval": "0.4.13"}
    return Score(
        model=model,
        task="mmlu",
        metric="acc",
        value=0.5,
        error=0.1,
        samples=4,
        protocol={"shots": 5, "limit": 10, "versions": versions, **protocol},
    )


def test_figures_of_different_protocols_are_not_compared() -> None:
    compare_scores([make_score("dense"), make_score("pruned")])
    other = make_score("pruned", limit=20, versions={"torch": "2.8", "lm-eval": "0.4.13"})
    with pytest.raises(UserError) as told:
        compare_scores([make_score("dense"), other])
    assert str(told.value) == (
        "mmlu acc of dense and of pruned must not be compared; their protocols differ in "
        "limit (10 and 20), versions.torch (2.9 and 2.8)"
    )


def test_differences_are_paired_where_there_is_a_value_for_each_question() -> None:
    first = Result(score=make_score("dense").model_copy(update={"value": 0.5}), values=[1.0, 1.0, 0.0, 0.0])
    second = Result(score=make_score("pruned").model_copy(update={"value": 0.25}), values=[1.0, 0.0, 0.0, 0.0])
    assert subtract(second, first) == (-0.25, 0.25, True)
    unpaired = subtract(Result(score=second.score, values=[]), first)
    assert unpaired is not None and unpaired.value == -0.25 and unpaired.error == pytest.approx(0.1 * 2**0.5)
    assert not unpaired.paired
    broken = Result(score=second.score.model_copy(update={"value": None, "error": None}), values=[])
    assert subtract(broken, first) is None
    with pytest.raises(UserError, match="must not be compared"):
        subtract(Result(score=make_score("pruned", limit=20), values=[]), first)


# What is refused


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"freebaseqa": ""}, "the task freebaseqa needs its questions: --freebaseqa file:PATH, such as"),
        ({"freebaseqa": "file:nowhere.jsonl"}, "file of questions nowhere.jsonl does not exist"),
        ({"freebaseqa": "somewhere"}, "source of questions 'somewhere' is not one of hub:NAME"),
        ({"shots": 8}, "has 8 questions, of which the first 8 are exemplars; none is left to ask"),
        ({"tasks": "mmlu", "mmlu": "nowhere"}, "source of MMLU 'nowhere' is neither hub nor file:DIR"),
        ({"tasks": "mmlu", "mmlu": "file:nowhere"}, "directory of MMLU nowhere has no dev.jsonl"),
        ({"tasks": "mmlu", "shots": 4}, "task mmlu_abstract_algebra has 3 exemplars, but 4 shots were asked for"),
        ({"tasks": "mmlu", "mmlu": "hub"}, "task mmlu could not be loaded: "),
    ],
)
def test_what_cannot_be_asked_is_told_in_a_line(data: Path, changes: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError) as told:
        load_benchmarks(settings_of(data, **{"tasks": "freebaseqa", **changes}), "fp32")
    assert error in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([{**make_choice("anatomy", "test 0"), "answer": 4}], "test.jsonl, line 1: answer: Input should be less than"),
        ([make_choice("anatomy", "test 0"), {"subject": "anatomy"}], "test.jsonl, line 2: question: Field required"),
        ([make_choice("law", "test 0")], "dev.jsonl has no exemplar of the subject law, which test.jsonl asks about"),
        ([], "test.jsonl is empty"),
    ],
)
def test_lines_of_mmlu_are_checked(tmp_path: Path, rows: list[Any], error: str) -> None:
    write_lines(tmp_path / "mmlu" / "dev.jsonl", [make_choice("anatomy", "dev 0")])
    write_lines(tmp_path / "mmlu" / "test.jsonl", rows)
    with pytest.raises(UserError) as told:
        load_benchmarks(settings_of(tmp_path, "mmlu", shots=1), "fp32")
    assert error in str(told.value)


def test_one_file_of_mmlu_is_the_test(data: Path, tmp_path: Path) -> None:
    for name in ("dev", "test_a", "test_b"):
        write_lines(tmp_path / "mmlu" / f"{name}.jsonl", [make_choice("anatomy", "dev 0")])
    with pytest.raises(UserError, match=r"has 2 files test\*\.jsonl, but exactly one is needed"):
        load_benchmarks(settings_of(tmp_path, "mmlu"), "fp32")


def test_unknown_tasks_are_refused_with_the_nearest_name(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    from tools.measure.tasks.mmlu import TEMPLATES

    # Reading all the harness' files takes it ten seconds; those of one directory will do.
    few = functools.partial(TaskManager, include_path=str(TEMPLATES), include_defaults=False)
    monkeypatch.setattr(benchmarks, "_index_tasks", few)
    with pytest.raises(UserError, match=r"task 'mmlu_anatomi' is not one of .*; did you mean mmlu_anatomy\?"):
        load_benchmarks(settings_of(data, "mmlu_anatomi"), "fp32")
    with pytest.raises(UserError, match=r"task 'freebasqa' is not one of .*; did you mean freebaseqa\?"):
        load_benchmarks(settings_of(data, "freebasqa,mmlu"), "fp32")
    with pytest.raises(UserError, match="task mmlu_anatomy could not be loaded: "):  # no hub is reachable
        load_benchmarks(settings_of(data, "mmlu_anatomy"), "fp32")


def test_questions_that_plans_are_judged_by_or_may_be_fitted_to_are_not_asked(data: Path) -> None:
    loop = tiny_settings("model", questions=f"file:{data / 'qa.jsonl'}", question_pairs=3)  # judged by 3, 4 and 5
    with pytest.raises(UserError) as told:
        refuse_shared_questions(settings_of(data, "freebaseqa"), loop)
    assert str(told.value) == (
        "freebaseqa would ask 5 questions that plans are judged by or may be fitted to, such as 'Who is 3?'; "
        "choose another --freebaseqa or a smaller --limit"
    )
    refuse_shared_questions(settings_of(data, "freebaseqa", limit=1), loop)
    with pytest.raises(UserError, match="ask 2 questions"):
        refuse_shared_questions(settings_of(data, "freebaseqa", shots=6), loop)


def test_without_the_harness_one_line_says_how_to_get_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert load_benchmarks(TaskSettings(), "fp32") == []
    with pytest.raises(UserError) as told:
        load_benchmarks(settings_of(data, "freebaseqa"), "fp32")
    assert str(told.value) == (
        "tasks need lm-evaluation-harness, which is not installed; try: pip install 'lm-eval>=0.4.13'"
    )


def test_tasks_are_a_list_separated_by_commas() -> None:
    assert TaskSettings.model_validate({"tasks": " mmlu, freebaseqa,,mmlu"}).tasks == ["mmlu", "freebaseqa"]
    assert TaskSettings.model_validate({"tasks": ""}).tasks == []
