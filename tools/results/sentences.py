"""The result of a run in words, the same in report.md, report.html and the model card."""

from tools.base.words import count, show
from tools.results.schema import Summary


def describe_result(summary: Summary) -> str:
    """The result in two sentences."""
    p = summary.perplexity
    rounds, undone = count(summary.iterations, "iteration"), count(summary.rollbacks, "rollback")
    text = (
        f"{summary.achieved_sparsity:.2%} of the prunable weights are zero (target {summary.target_sparsity:.2%}), "
        f"after {rounds} with {undone}. Test perplexity is {show(p.pruned)}; dense {show(p.dense)}, uniform Wanda at "
        f"the same sparsity {show(p.uniform_wanda)}"
    )
    if p.dense and p.pruned and p.uniform_wanda and p.uniform_wanda > p.dense:
        share = (p.pruned - p.dense) / (p.uniform_wanda - p.dense)
        text += f", so the degradation is {share:.2f} times uniform Wanda's"
    if summary.knowledge and summary.knowledge.retention is not None:
        text += f". Of its factual recall {summary.knowledge.retention:.1%} is left"
    return text + "."


def list_loading(directory: str) -> list[str]:
    """Lines of Python that load the model from a directory."""
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{directory}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{directory}")',
    ]
