"""The result of a run in words: sentences for report.md, report.html and the model card, lines for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from tools.base.words import clean, count, show, show_compact, show_percent, show_seconds, show_size
from tools.plans.methods import Statistics
from tools.results.schema import (
    CutResult,
    Knowledge,
    Origin,
    Polished,
    Reach,
    Summary,
    TextFigures,
    Weighting,
)

BEHIND: dict[Statistics, str] = {
    "sequential": "each block behind its pruned predecessors",
    "dense": "statistics of the dense model",
}
"""What layers were pruned by, in words."""


def describe_result(summary: Summary) -> str:
    """The result in two sentences, and one more each where texts have names, where it was polished, or where much of
    the model cannot be pruned."""
    p = summary.perplexity
    rounds, undone = count(summary.iterations, "iteration"), count(summary.rollbacks, "rollback")
    state = "zero" if summary.asked == "sparsity" else "gone"
    text = (
        f"{summary.achieved_sparsity:.2%} of {name_prunable(summary.reach)} are {state} (target "
        f"{summary.target_sparsity:.2%}){tell_share(summary.achieved_sparsity, summary.reach)}, after {rounds} "
        f"with {undone}. Test perplexity is {show(p.pruned)}; dense {show(p.dense)}, uniform Wanda at the same "
        f"sparsity ({BEHIND[summary.wanda_statistics]}) {show(p.uniform_wanda)}"
    )
    if (share := relate_to_wanda(p.dense, p.pruned, p.uniform_wanda)) is not None:
        text += f", so the degradation is {share:.2f} times uniform Wanda's"
    if summary.texts:
        shares = ", ".join(f"{text.weight:.0%} {text.name}" for text in summary.texts)
        text += f". Figures are means over {len(summary.texts)} texts ({shares})"
    if summary.knowledge and summary.knowledge.retention is not None:
        text += f". Answer probability kept: {summary.knowledge.retention:.1%}{_tell_right(summary.knowledge)}"
    if summary.cut:
        text += f". {describe_cut(summary.cut)}"
    if summary.origin:
        text += f". {describe_origin(summary.origin)}"
    if summary.polished:
        text += f". The surviving weights were {describe_polish(summary.polished)}"
    return f"{text}. {told}" if (told := describe_reach(summary.reach)) else f"{text}."


def name_text(settings: Mapping[str, Any], split: str) -> str:
    """What the windows of a split are of; named texts with what each counts in the figures, and what is mixed in."""
    texts, weights = settings.get("text", {}), settings.get("text_weights", {})
    if not texts:
        mix = settings.get("calibration_mix") if split == "calibration" else None
        return f"`{settings[split]}`" + (f", {mix:.0%} of them questions with their answers" if mix else "")
    told = [f"{name} (`{source}`, weight {weights.get(name, 1):g})" for name, source in texts.items()]
    return f"each of {', '.join(told)}"


def _tell_right(knowledge: Knowledge) -> str:
    """`, exact match 9 beside the dense model's 12 of 256`; "" where that has none right, or nobody counted."""
    if not knowledge.dense_right or knowledge.pruned_right is None:
        return ""
    return (
        f", exact match {knowledge.pruned_right} beside the dense model's {knowledge.dense_right} of {knowledge.pairs}"
    )


def name_prunable(reach: Reach) -> str:
    """`the 106,168,320 prunable weights`."""
    return f"the {reach.prunable:,} prunable weights"


def tell_share(share: float, reach: Reach) -> str:
    """`, 35.52% of the whole model`: what a share of the prunable weights is of all."""
    return f", {share * reach.of_model:.2%} of the whole model"


def describe_polish(polished: Polished) -> str:
    """`polished on 25,000 tokens (held-out KL 0.5871 → 0.5013, 2 passes)`, or that it did not help; behind the tokens
    `with means of the optimiser in bf16` where they were."""
    rounded = "" if polished.means == "fp32" else f" with means of the optimiser in {polished.means}"
    text = f"polished on {polished.tokens:,} tokens{rounded}"
    if not polished.helped:
        return f"{text} in vain (held-out KL never below {polished.before:.4f}, so what was before is kept)"
    passes = f", {polished.passes} passes" if polished.passes > 1 else ""
    return f"{text} (held-out KL {polished.before:.4f} → {polished.after:.4f}{passes})"


def describe_cut(cut: CutResult) -> str:
    """What went, and what stays: `Cut to 80.05% of its bytes (asked for 80.00%): 1 group of heads and 128 neurons of
    every block and blocks 5 10 went; 41.2 tokens/s decoded, dense 33.0`."""
    went = [count(cut.heads, "group") + " of heads"] if cut.heads else []
    went += [count(cut.neurons, "neuron")] if cut.neurons else []
    told = [" and ".join(went) + " of every block"] if went else []
    told += [f"block{'s' * (len(cut.blocks) > 1)} {', '.join(map(str, cut.blocks))}"] if cut.blocks else []
    what = f"Cut to {cut.share:.2%} of its bytes (asked for {cut.size:.2%}): {' and '.join(told)} went"
    if cut.gain is None:
        return f"{what}; how fast it decodes was not timed, for it was on no one device"
    return (
        f"{what}; {cut.decoded_per_second:.1f} tokens/s decoded, dense {cut.dense_decoded_per_second:.1f} "
        f"({cut.gain:.2f} times as many)"
    )


def describe_origin(origin: Origin) -> str:
    """`The dense model was cut to 80% of its bytes before, by run x; test perplexity before that 26.44`."""
    before = "" if origin.perplexity is None else f"; test perplexity before that {show(origin.perplexity)}"
    return f"The dense model was {name_share(origin.share)} before, by run {clean(origin.run)}{before}"


def name_cut(cut: CutResult | None) -> str:
    """`cut to 80% of its bytes`, of the whole model; `not cut` where no cut that was tried was kept."""
    return name_share(cut.share) if cut else "not cut"


def name_share(share: float) -> str:
    """`cut to 80% of its bytes`."""
    return f"cut to {share:.0%} of its bytes"


def describe_reach(reach: Reach) -> str:
    """Which share of the model is prunable, in one sentence; "" where it is nearly all of the blocks."""
    if reach.is_nearly_all:
        return ""
    return (
        f"Only {reach.of_blocks:.1%} of the weights in the blocks are prunable, {reach.of_model:.1%} of the whole "
        "model; all others are dense."
    )


def name_sparsity(summary: Summary) -> str:
    """The sparsity for a title, and of what it is where much of the model cannot be pruned."""
    achieved, reach = f"{summary.achieved_sparsity:.2%}", summary.reach
    if reach.is_nearly_all:
        return achieved
    return f"{achieved} of the {reach.of_blocks:.1%} of its blocks' weights that are prunable"


def name_verdict(trial: Mapping[str, Any]) -> str:
    """A trial's verdict; of one that broke while it was carried out, that it did."""
    return "broke" if trial.get("broken") else str(trial["verdict"])


def tell_texts(texts: Sequence[Mapping[str, Any]]) -> str:
    """`code KL 0.2103 ± 0.0040, perplexity 5.12; prose KL …`: figures of named texts, from a trial or a summary."""
    told = []
    for text in texts:
        error = "" if text["kl"] is None or text.get("kl_error") is None else f" ± {show_compact(text['kl_error'], 4)}"
        perplexity = text["perplexity"] if "perplexity" in text else text["pruned"]
        kl = f"KL {show_compact(text['kl'], 4)}{error}"
        told.append(f"{clean(text['name'], 40)} {kl}, perplexity {show_compact(perplexity)}")
    return "; ".join(told)


def describe_weighting(weighting: Weighting) -> str:
    """`by weights code 50%, prose 50%: code KL 0.1917 (+0.0037 ± 0.0054), …`, beside what was kept."""
    told = [f"{clean(text.name, 40)} KL {show_change(text)}" for text in weighting.texts]
    return f"by weights {name_weights(weighting.weights)}: {', '.join(told)} beside what was kept"


def compare_weightings(weightings: Sequence[Weighting]) -> list[list[str]]:
    """Rows of what texts lose by other weights: the weights, then a cell for each text; the kept ones first."""
    return [[name_weights(x.weights), *map(show_change, x.texts)] for x in weightings]


def name_weights(weights: Mapping[str, float]) -> str:
    """`code 75%, prose 25%`."""
    return ", ".join(f"{clean(name, 40)} {share:.0%}" for name, share in weights.items())


def show_change(text: TextFigures) -> str:
    """`0.1917 (+0.0037 ± 0.0054)`: a KL, and by how much it is above that of other weights, where it is known."""
    if text.change is None or text.change_error is None:
        return show(text.kl, 4)
    return f"{show(text.kl, 4)} ({text.change:+.4f} ± {text.change_error:.4f})"


def tell_spending(usage: Mapping[str, Any]) -> str:
    """Calls, tokens and dollars of the agents, and what of it is Billhook's own count."""
    tokens = f"{usage['input_tokens']:,} tokens in, {usage['output_tokens']:,} out"
    text = f"{count(usage['calls'], 'call')}, {tokens}, ${usage['cost']:.4f}"
    if own := usage.get("own_count"):
        text += f"; {own:,} of the tokens by our own count"
    if failed := usage.get("failed_requests"):
        text += f"; {count(failed, 'request')} failed"
    return text


def list_loading(directory: str) -> list[str]:
    """Lines of Python that load the model from a directory."""
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{directory}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{directory}")',
    ]


def list_outcome(result: Mapping[str, Any]) -> list[str]:
    """Three lines with a summary's figures (one more where much of the model cannot be pruned, where it was polished or
    cut, or was before, or where texts have names), one for each figure of a task, then where model and report are.
    """
    dense, pruned, uniform = (result["perplexity"][key] for key in ("dense", "pruned", "uniform_wanda"))
    share = relate_to_wanda(dense, pruned, uniform)
    compared = "not to be compared with uniform Wanda's" if share is None else f"{share:.2f} × that of uniform Wanda"
    reach = Reach.model_validate(result["reach"])
    told = f" of {name_prunable(reach)}{tell_share(result['achieved_sparsity'], reach)}"
    return [
        f"{clean(result['status'])}: sparsity {show_percent(result['achieved_sparsity'])} "
        f"(target {show_percent(result['target_sparsity'])}){told}, {count(result['iterations'], 'iteration')}, "
        f"{result['rollbacks']} rolled back",
        *([partly] if (partly := describe_reach(reach)) else []),
        f"perplexity: {show_compact(pruned)} pruned, {show_compact(dense)} dense, {show_compact(uniform)} uniform "
        f"Wanda; KL {show_compact(result['kl'], 4)}",
        *([f"texts: {tell_texts(texts)}"] if (texts := result.get("texts")) else []),
        f"degradation: {compared}; {show_seconds(result['seconds'])}, "
        f"peak memory {_show_memory(result['peak_memory_bytes'])}",
        *([describe_polish(Polished.model_validate(polished))] if (polished := result.get("polished")) else []),
        *([describe_cut(CutResult.model_validate(cut))] if (cut := result.get("cut")) else []),
        *([describe_origin(Origin.model_validate(origin))] if (origin := result.get("origin")) else []),
        *_list_scores(result.get("benchmarks", [])),
        f"model:  {clean(result['model_directory'], 1000)}",
        f"report: {clean(result['report'], 1000)}",
    ]


def _show_memory(size: float | None) -> str:
    if size is None:
        return "not measured"
    return show_size(size, "GB") if size >= 1e9 else show_size(size, "MB", 0)


def _list_scores(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each figure of a task, the models side by side."""
    lines: dict[str, list[str]] = {}
    for score in scores:
        error = "" if score["error"] is None else f" ± {show_compact(score['error'], 4)}"
        shown = f"{show_compact(score['value'], 4)}{error} {clean(score['model'])}"
        lines.setdefault(f"{clean(score['task'])} {clean(score['metric'])}", []).append(shown)
    return [f"{name}: {', '.join(shown)}" for name, shown in lines.items()]


def relate_to_wanda(dense: float | None, pruned: float | None, uniform: float | None) -> float | None:
    """How far perplexity rose above the dense model's, as a share of what uniform Wanda makes it rise.

    None where one was not finite, or Wanda's did not rise.
    """
    if dense is None or pruned is None or uniform is None or not uniform > dense:
        return None
    return (pruned - dense) / (uniform - dense)
