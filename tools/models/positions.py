"""How many tokens a model can have before it, and on how many it is checked."""

from typing import Any

from tools.base.errors import UserError

CHECKED = 16
"""Tokens on which what a model is taken for is compared with the model itself, when it is loaded."""


def count_positions(model: Any) -> int | None:
    """Tokens that the model can have before it; None where its config sets no bound."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None or positions < 1 else positions  # XLNet's is -1


def refuse_long_windows(model: Any, window: int, lead: int) -> None:
    """Raises UserError when windows of text, behind `lead` more tokens, do not fit the model's positions."""
    positions = count_positions(model)
    if positions is None or window + lead <= positions:
        return
    if not lead:
        raise UserError(
            f"windows of {window} tokens do not fit the {positions} positions that the model has; use --window "
            f"{positions}"
        )
    raise UserError(
        f"windows of {window} tokens behind the beginning-of-sequence token take {window + lead} positions, but "
        f"the model has {positions}; use --window {positions - lead}, or --bos never"
    )


def refuse_long_question(model: Any, question: str, tokens: int) -> None:
    """Raises UserError when a question, of so many tokens with its answer, does not fit the model's positions."""
    positions = count_positions(model)
    if positions is not None and tokens > positions:
        raise UserError(
            f"question {question[:60]!r} takes {tokens} tokens with its answer, and the model has {positions} "
            "positions; leave it out"
        )
