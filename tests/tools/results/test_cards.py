"""The model card: valid front matter with what is known, the report's figures, and no path of this machine."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from tests.made_runs import CUT
from tests.tiny import tiny_settings
from tools.base.settings import WorkbenchSettings
from tools.results.cards import write_card
from tools.results.schema import Perplexities, Polished, Reach, Score, Summary, describe_protocol


def make_summary(settings: WorkbenchSettings, **changes: Any) -> Summary:
    """A summary made up."""
    fields: dict[str, Any] = {
        **{"run": "run", "model": settings.model, "status": "finished", "target_sparsity": 0.5},
        **{"achieved_sparsity": 0.5, "perplexity": Perplexities(dense=10, pruned=12.34567, uniform_wanda=None)},
        **{"kl": 0.1, "iterations": 2, "rollbacks": 1, "seconds": 1.0, "peak_memory_bytes": 1, "mask_sha256": "ab"},
        "protocol": describe_protocol(settings),
        **{"reach": Reach(of_blocks=1.0, of_model=0.8, prunable=8000), "kept": 1, "wanda_statistics": "sequential"},
    }
    return Summary.model_validate(fields | changes)


def read_card(settings: WorkbenchSettings, **changes: Any) -> ModelCard:
    return ModelCard(write_card(make_summary(settings, **changes), settings))


def test_a_model_and_texts_of_the_hub_are_named() -> None:
    settings = tiny_settings(
        "Qwen/Qwen3-4B", calibration="hub:allenai/c4/en:train", test="hub:Salesforce/wikitext/wikitext-2-raw-v1:test"
    )
    data = read_card(settings).data
    assert (data.base_model, data.datasets, data.license) == ("Qwen/Qwen3-4B", ["allenai/c4"], None)
    (found,) = data.eval_results or []
    assert (found.dataset_type, found.dataset_config, found.dataset_split) == (
        *("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    )
    assert (found.metric_type, found.metric_value) == ("perplexity", 12.3457)


def test_of_files_on_this_machine_only_the_names_are_told(tmp_path: Path) -> None:
    (tmp_path / "my: model").mkdir()
    settings = tiny_settings(
        tmp_path / "my: model", calibration=f"file:{tmp_path}/c.txt", test=f"file:{tmp_path}/my # text.txt"
    )
    card = read_card(settings)
    assert str(tmp_path) not in card.content
    assert (card.data.base_model, card.data.datasets, card.data.model_name) == (None, None, "my: model-pruned")
    assert [result.dataset_type for result in card.data.eval_results or []] == ["file:my # text.txt"]
    assert "# my: model, pruned to 50.00%" in card.content.splitlines()


def test_a_card_says_of_what_its_sparsity_is_a_share() -> None:
    card = read_card(tiny_settings("tiny"), reach=Reach(of_blocks=0.03, of_model=0.025, prunable=8000))
    assert "# tiny, pruned to 50.00% of the 3.0% of its blocks' weights that are prunable" in card.content.splitlines()
    assert "Only 3.0% of the weights in the blocks are prunable, 2.5% of the whole model; all others" in card.content


def test_a_card_says_where_means_of_a_polish_were_rounded() -> None:
    polished = Polished(tokens=1000, passes=1, steps=2, planned_steps=2, before=0.5, after=0.4, seconds=1.0)
    plain = read_card(tiny_settings("tiny"), polished=polished).content
    assert "The surviving weights were polished on 1,000 tokens (held-out KL 0.5000 → 0.4000)." in plain
    words = "polished on 1,000 tokens with means of the optimiser in bf16"
    polished = polished.model_copy(update={"means": "bf16"})
    assert f"{words} (held-out KL 0.5000" in read_card(tiny_settings("tiny"), polished=polished).content
    polished = polished.model_copy(update={"steps": 0})
    assert f"{words} in vain" in read_card(tiny_settings("tiny"), polished=polished).content


def test_a_perplexity_that_is_not_finite_is_no_result() -> None:
    card = read_card(tiny_settings("Qwen/Qwen3-4B"), perplexity=Perplexities(dense=10, pruned=None, uniform_wanda=None))
    assert card.data.eval_results is None
    assert "| **this model** | **not finite** |" in card.content.splitlines()


def test_benchmarks_of_the_pruned_model_are_results() -> None:
    scores = [
        Score(model=model, task="mmlu", metric="acc", value=value, error=0.01, samples=100, protocol={"task": "mmlu"})
        for model, value in (("dense", 0.5), ("pruned", 0.4))
    ]
    results = read_card(tiny_settings("Qwen/Qwen3-4B"), benchmarks=scores).data.eval_results or []
    assert [(r.dataset_type, r.metric_type, r.metric_value) for r in results] == [
        *(("pydoc", "perplexity", 12.3457), ("mmlu", "acc", 0.4)),
    ]


def test_a_card_of_what_was_cut_and_then_pruned_tells_both() -> None:
    origin = {"run": "small", "model": "tiny", "cut": CUT, "perplexity": None}
    card = read_card(tiny_settings("runs/small/model"), origin=origin)
    assert card.data.tags == ["pruned", "structured", "sparse", "billhook"]
    assert "Whole parts are gone, and zeros of what stays are stored as ordinary numbers: the file" in card.text
    assert read_card(tiny_settings("tiny"), asked="size", cut=CUT).data.tags == ["pruned", "structured", "billhook"]
    assert read_card(tiny_settings("tiny"), asked="size", achieved_sparsity=0.0).data.tags == ["billhook"]
    assert read_card(tiny_settings("tiny")).data.tags == ["pruned", "sparse", "billhook"]


def test_a_card_of_two_cuts_tells_what_is_left_of_the_first_model() -> None:
    origin = {"run": "small", "model": "tiny", "cut": CUT, "perplexity": None}
    twice = read_card(tiny_settings("runs/small/model"), asked="size", cut=CUT, origin=origin).text
    assert (
        "# tiny, cut to 66% of its bytes\n" in twice and "The dense model was cut to 81% of its bytes before" in twice
    )
    kept = read_card(tiny_settings("runs/small/model"), asked="size", achieved_sparsity=0.0, origin=origin)
    assert "# tiny, cut to 81% of its bytes\n" in kept.text and kept.data.tags == ["pruned", "structured", "billhook"]
