"""How lists of choices are told, to planners, in help and in tables: from their names and one sentence each."""

from collections.abc import Iterable
from itertools import groupby
from typing import Protocol

from tools.base.words import escape


class Named(Protocol):
    """What every entry of a registry has."""

    @property
    def name(self) -> str:
        """By which people ask for it."""

    @property
    def sentence(self) -> str:
        """What it does, without a full stop; neighbours that share one are told of together."""


def describe_named(choices: Iterable[Named]) -> str:
    """`NAME: sentence. NAME, NAME: sentence.`"""
    return " ".join(f"{', '.join(names)}: {sentence}." for names, sentence in _group(choices))


def list_named(title: str, choices: Iterable[Named]) -> list[str]:
    """The lines of a Markdown table, for a README."""
    rows = [f"| {', '.join(f'`{name}`' for name in names)} | {escape(text)} |" for names, text in _group(choices)]
    return [f"| {title} | |", "|---|---|", *rows]


def _group(choices: Iterable[Named]) -> list[tuple[list[str], str]]:
    return [([x.name for x in group], text) for text, group in groupby(choices, key=lambda choice: choice.sentence)]
