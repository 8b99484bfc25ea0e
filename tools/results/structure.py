"""`structure.json`: a model that parts were cut out of, beside the dense one."""

from pydantic import BaseModel, Field
from rich.table import Table

from tools.base.words import show, show_percent, show_share
from tools.results.schema import Protocol


class Figures(BaseModel):
    """One model, measured."""

    parameters: int
    file_bytes: int = Field(description="Of its weights on disk, in the number format of the run.")
    perplexity: float | None = Field(description="On the validation text; null where the loss was not finite.")
    seconds_per_window: float = Field(description="Forward of one window, logits of its last token; median.")
    decoded_per_second: float = Field(description="Tokens a second of greedy decoding, one sequence; median.")


class Kept(BaseModel):
    """How much of what the dense model knew of questions is left (`ANSWERS_KEPT`)."""

    source: str
    pairs: int
    without_refit: float | None = Field(description="Null where it was not finite, here and below.")
    share: float | None = Field(description="After the refit.")
    error: float | None = Field(description="The share's standard error over the questions.")


class Structure(BaseModel):
    """`structure.json`."""

    model: str
    parts: str
    target: float = Field(description="Share of the weights of the blocks' linear layers to remove.")
    size: float | None = Field(None, description="Share of the model's bytes to keep, where that was asked for.")
    removed: float = Field(description="The share that was removed.")
    heads: int = Field(description="Groups of attention heads removed from every block.")
    neurons: int = Field(description="Neurons removed from every block.")
    blocks: list[int] = Field(description="Blocks removed, counted from 0 in the dense model.")
    constraint: str
    dense: Figures
    cut: Figures = Field(description="After the refit.")
    perplexity_without_refit: float | None
    kl_without_refit: float | None = Field(description="KL(dense || cut) on the validation text, nats per token.")
    kl: float | None = Field(description="The same after the refit.")
    knowledge: Kept | None = Field(None, description="Null where no questions were asked.")
    protocol: Protocol


HEADS = ("", "dense", "cut", "cut and refitted")
"""Of the columns of `list_rows`."""


def list_rows(result: Structure) -> list[tuple[str, str, str, str]]:
    """The figures of the dense, the cut and the refitted model."""
    dense, cut = result.dense, result.cut
    return [
        ("parameters", f"{dense.parameters:,}", "", f"{cut.parameters:,}"),
        ("file, MB", f"{dense.file_bytes / 1e6:.1f}", "", f"{cut.file_bytes / 1e6:.1f}"),
        ("perplexity", show(dense.perplexity), show(result.perplexity_without_refit), show(cut.perplexity)),
        ("KL to dense", "", show(result.kl_without_refit, 4), show(result.kl, 4)),
        *([_list_kept(result.knowledge)] if result.knowledge else []),
        (
            f"forward of {result.protocol.window} tokens, ms",
            f"{dense.seconds_per_window * 1e3:.0f}",
            "",
            f"{cut.seconds_per_window * 1e3:.0f}",
        ),
        ("decoded tokens/s", f"{dense.decoded_per_second:.1f}", "", f"{cut.decoded_per_second:.1f}"),
    ]


def _list_kept(kept: Kept) -> tuple[str, str, str, str]:
    answers = f"answers kept, of {kept.pairs}"
    return answers, "", show_percent(kept.without_refit, 1), show_share(kept.share, kept.error)


def name_removed(result: Structure) -> str:
    """`20.14% of the blocks' weights cut, 15.90% of the whole model`."""
    share = 1 - result.cut.parameters / result.dense.parameters
    return f"{result.removed:.2%} of the blocks' weights cut, {share:.2%} of the whole model"


def name_target(result: Structure) -> str:
    """`20.14% removed (asked for 20.00%)`, or how much of the whole model stays where its size was asked for."""
    if result.size is None:
        return f"{result.removed:.2%} removed (asked for {result.target:.2%})"
    return f"{result.cut.parameters / result.dense.parameters:.2%} of the model stays (asked for {result.size:.2%})"


def make_table(result: Structure) -> Table:
    """The figures side by side."""
    table = Table(title=f"{result.model}: {name_removed(result)}")
    for i, title in enumerate(HEADS):
        table.add_column(title, justify="right" if i else "left")
    for row in list_rows(result):
        table.add_row(*row)
    return table
