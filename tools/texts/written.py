"""Text that the model writes itself: which splits ask for it, by which prompts, and when it came out degenerate."""

from collections.abc import Callable, Sequence

from tools.base.errors import UserError
from tools.base.settings import SPLITS, WorkbenchSettings

WrittenText = Callable[[str, Sequence[str], int], list[int]]
"""Called with (part, prompts, least number of tokens): the tokens of documents that the model wrote, one behind the
other. Without prompts each begins where a document does."""

BATCH = 16
"""Documents that are written at once: each step reads all weights once, however many there are. A calibration text as
long as the default's is one batch, and what a kill loses is one."""

GRAM = 8
"""Tokens in a row that count as said again when they come a second time."""

MOST_REPEATED = 0.25
"""Share of its 8-grams that a document may have in common with itself and those before it. In 64 windows of 512 tokens
the greatest was 0.18 on WikiText-2 and 0.12 on Python's reference (SmolLM2's tokenizer)."""

MOST_DEGENERATE = 0.5
"""Share of the documents drawn that may be thrown away; beyond it the text is refused."""


def is_written(source: str) -> bool:
    """Whether the model writes a source itself."""
    return source == "self" or source.startswith("self:")


def parse_prompts(source: str) -> list[str]:
    """The prompts of `self:PROMPT | PROMPT …`, none of `self`. UserError for an empty one, or one named twice."""
    if source == "self":
        return []
    prompts = [prompt.strip() for prompt in source.removeprefix("self:").split(" | ")]
    if not all(prompts):
        raise UserError(
            f"text source {source!r} has an empty prompt; write self:PROMPT, or self alone for text without one"
        )
    if twice := next((prompt for prompt in prompts if prompts.count(prompt) > 1), None):
        raise UserError(f"text source {source!r} names the prompt {twice!r} twice; give every prompt once")
    return prompts


def name_part(text: str, split: str) -> str:
    """What the windows of a split are called that come from a named text; the split alone where texts have no names."""
    return f"{text} {split}" if text else split


def split_part(part: str) -> tuple[str, str]:
    """(the named text or "", the split) of what `name_part` gives."""
    text, _, split = part.rpartition(" ")
    return text, split


def deal_prompts(settings: WorkbenchSettings) -> dict[str, list[str]]:
    """The prompts of every part (`count_windows`) that the model writes.

    No prompt serves two parts. Of a source that several splits of a text have, the last prompt is the last split's, the
    one before it that of the split before, and all others are the first one's. Raises UserError where there are too
    few for that, or two sources share one.
    """
    dealt: dict[str, list[str]] = {}
    for text in settings.text or [""]:
        parts = {name_part(text, split): find_source(settings, name_part(text, split)) for split in SPLITS}
        dealt |= _deal({part: source for part, source in parts.items() if is_written(source)})
    named = [prompt for prompts in dealt.values() for prompt in prompts]
    if twice := next((prompt for prompt in named if named.count(prompt) > 1), None):
        first, second = (part for part in dealt if twice in dealt[part])
        raise UserError(f"the {first} and {second} texts come from the same prompt, {twice!r}; give each its own")
    return dealt


def _deal(sources: dict[str, str]) -> dict[str, list[str]]:
    """The prompts of the written parts of one text."""
    dealt: dict[str, list[str]] = {}
    for source in dict.fromkeys(sources.values()):
        prompts, sharing = parse_prompts(source), [part for part in sources if sources[part] == source]
        others = len(prompts) - len(sharing) + 1
        if prompts and others < 1:
            raise UserError(
                f"the {' and '.join(sharing)} texts come from {len(prompts)} prompt{'s' * (len(prompts) > 1)} of one "
                f"source, {source!r}: what is measured on must come from other prompts than what is fitted to; give "
                f"{len(sharing)} or more, separated by ' | ' (the last for the {sharing[-1]} text), or another source"
            )
        shares = [prompts[:others], *([prompt] for prompt in prompts[others:])] if prompts else [[] for _ in sharing]
        dealt |= zip(sharing, shares, strict=True)
    return dealt


def count_windows(settings: WorkbenchSettings) -> dict[str, int]:
    """Windows of running text in every part, in the order in which a source that they share is cut.

    A part is a split, or a split of a named text, such as `code validation`.
    """
    splits = {
        "calibration": settings.calibration_windows - settings.count_mixed(settings.calibration_mix),
        "validation": settings.validation_windows,
        "test": settings.test_windows,
    }
    return {name_part(text, split): count for text in settings.text or [""] for split, count in splits.items()}


def find_source(settings: WorkbenchSettings, part: str) -> str:
    """The source of a part."""
    text, split = split_part(part)
    return settings.text[text] if text else str(getattr(settings, split))


def list_written(settings: WorkbenchSettings) -> dict[str, int]:
    """Windows of every part that the model writes."""
    return {
        part: count
        for part, count in count_windows(settings).items()
        if count and is_written(find_source(settings, part))
    }


def take_fresh(document: Sequence[int], said: set[tuple[int, ...]]) -> bool:
    """Whether a document is no loop and no repeat: at most MOST_REPEATED of its grams came before, in it or in `said`.

    `said` grows by its grams where it is fresh. A document shorter than GRAM is one gram; an empty one is not fresh.
    """
    length = min(GRAM, len(document))
    grams = [tuple(document[i : i + length]) for i in range(len(document) - length + 1)] if document else []
    known: set[tuple[int, ...]] = set()
    repeated = 0
    for gram in grams:
        repeated += gram in known or gram in said
        known.add(gram)
    fresh = bool(grams) and repeated <= MOST_REPEATED * len(grams)
    if fresh:
        said |= known
    return fresh
