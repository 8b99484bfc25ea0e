"""Tiny models asked by lm-evaluation-harness: what is asked, and what is measured."""

import copy
from pathlib import Path

import pytest
import torch
import yaml

from tests.rows import write_rows
from tests.tasks import ask, settings_of
from tests.tiny import make_beginning_tokenizer, make_tiny_model, make_tiny_tokenizer, tiny_settings
from tools.base.files import hash_file
from tools.base.progress import ignore_progress
from tools.measure import benchmarks
from tools.measure.benchmarks import load_benchmarks
from tools.measure.harness import run_benchmark, warn_of_cut_prompts
from tools.models.load import load_model
from tools.models.streamed import find_stream


def test_the_limit_takes_the_first_questions(data: Path) -> None:
    task, results = ask(data, "freebaseqa", limit=2, shots=0)
    assert [instance.args[0] for instance in task.instances][::2] == [f"Question: Who is {i}?\nAnswer:" for i in (0, 1)]
    assert [(result.score.samples, result.score.protocol["limit"]) for result in results] == [(2, 2), (2, 2)]


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
    run_benchmark(benchmark, make_tiny_model("llama"), tokenizer, "tiny", ignore_progress)
    assert tokenizer.pad_token is None


def test_the_harness_begins_prompts_as_the_tokenizer_begins_a_text(data: Path) -> None:
    (benchmark,) = load_benchmarks(settings_of(data, "freebaseqa", limit=2), "fp32")
    model, seen = make_tiny_model("llama"), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _module, ids: seen.extend(ids[0].tolist()))
    for tokenizer in (make_tiny_tokenizer(), make_beginning_tokenizer()):
        seen.clear()
        run_benchmark(benchmark, model, tokenizer, "tiny", ignore_progress)
        begun = [row[0] == make_beginning_tokenizer().bos_token_id for row in seen if len(row) > 1]
        assert begun == [tokenizer is make_beginning_tokenizer()] * 4, "two questions, each asked twice"


def test_prompts_that_are_too_long_are_counted(data: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "long.jsonl", [{"question": f"{i} " * 2500, "answer": "a"} for i in range(3)])
    _, results = ask(data, "freebaseqa", freebaseqa=source)
    assert results[0].score.protocol["cut_prompts"] == 2  # the one question left, for both metrics
    told: list[str] = []
    warn_of_cut_prompts(results, told.append)
    assert told == ["freebaseqa: 2 prompts are longer than tiny reads and lost their beginning"]


def test_a_model_that_computes_nothing_finite_has_no_figure(data: Path) -> None:
    (benchmark,) = load_benchmarks(settings_of(data, "freebaseqa", limit=2), "fp32")
    model = make_tiny_model("llama")
    model.model.norm.weight.fill_(float("nan"))
    match, logprob = run_benchmark(benchmark, model, make_tiny_tokenizer(), "broken", ignore_progress)
    assert match.score.value == 0.0
    assert (logprob.score.value, logprob.score.error, logprob.values) == (None, None, [])


def test_the_protocol_says_all_that_figures_must_share(data: Path) -> None:
    _, (first, second) = ask(data, "freebaseqa")
    protocol = first.score.protocol
    assert list(protocol) == [
        *("task", "version", "shots", "limit", "data", "dtype", "batch_size", "chat_template", "seed", "versions"),
        *("prompts_sha256", "cut_prompts"),
    ]
    assert protocol["data"] == {"qa.jsonl": hash_file(data / "qa.jsonl")}
    assert list(protocol["versions"]) == ["torch", "transformers", "lm-eval", "datasets"]
    assert second.score.protocol == {**protocol, "answer_tokens": second.score.protocol["answer_tokens"]}


def test_a_streamed_model_answers_as_one_that_is_held(data: Path, tiny_llama: Path, tmp_path: Path) -> None:
    (benchmark,) = load_benchmarks(settings_of(data, "freebaseqa", limit=3, batch_size=2), "fp32")
    found = []
    for device in ("cpu", "stream"):
        model, tokenizer = load_model(tiny_settings(tiny_llama, device=device), tmp_path)
        assert (find_stream(model) is not None) == (device == "stream")
        found.append(run_benchmark(benchmark, model, tokenizer, "tiny", ignore_progress))
    held, streamed = found
    assert [result.values for result in streamed] == [result.values for result in held]
    assert [result.score for result in streamed] == [result.score for result in held]
