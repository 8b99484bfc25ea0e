"""A chat model that is whoever answers by files: `exchange:DIR`.

For machines without a network, for a person, or for any assistant that reads and writes files. Each prompt becomes
`DIR/NUMBER-HASH.prompt.md`, which says so itself, and the run waits until `DIR/NUMBER-HASH.answer.txt` is there. The
hash is that of the prompt, so that a run that was killed, or is made again, finds the prompts that it has written, and
answers to them.
"""

import hashlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from pydantic import PrivateAttr

from graph.llm.answers import READ_LIMIT
from graph.llm.attempts import describe_terms
from graph.llm.ladder import Method
from tools.base.files import explain_unwritable, write_text
from tools.base.progress import Progress, heed_stop

LOOK_SECONDS = 0.2
"""Between two looks for an answer."""
ROLES = {"system": "system", "ai": "assistant"}
"""How a prompt calls who says something; all others are the user."""


def check_exchange(directory: str) -> Path:
    """The directory, made if need be. Raises UserError where files cannot be written there."""
    path = Path(directory).expanduser()
    with explain_unwritable(f"exchange:{directory}"):
        path.mkdir(parents=True, exist_ok=True)
    return path


def open_exchange(directory: str, answer_tokens: int, progress: Progress) -> BaseChatModel:
    """The chat model `exchange:DIR`; whoever waits is told by `progress` for which file. Raises UserError."""
    chat = ExchangeChat(name=f"exchange:{directory}", metadata=describe_terms(0, answer_tokens))
    chat._directory, chat._progress = check_exchange(directory), progress
    return chat


class ExchangeChat(BaseChatModel):
    """Prompts and answers in files, as LangChain sees them."""

    methods: ClassVar[tuple[Method, ...]] = ("text",)
    _directory: Path = PrivateAttr()
    _progress: Progress = PrivateAttr()
    _read: Path | None = PrivateAttr(None)
    """The answer that was read last."""

    @property
    def again(self) -> str:
        """How an answer that was of no use is given anew: answers that are there are read again."""
        return f"; delete {self._read} to answer its prompt anew, or those before it, too" if self._read else ""

    @property
    def _llm_type(self) -> str:
        return "billhook-exchange"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **_: Any,
    ) -> ChatResult:
        """Write the prompt, unless it is there, and wait for its answer. Raises Stopped, and UserError."""
        prompt = write_prompt(self._directory, write_conversation(messages))
        answer = name_answer(prompt)
        self._progress(f"wait for {answer}", 0, 1)
        while (found := find_answer(prompt)) is None:
            heed_stop()
            time.sleep(LOOK_SECONDS)
        self._progress(f"wait for {answer}", 1, 1)
        self._read = found
        with found.open(encoding="utf-8", errors="replace") as file:
            text = file.read(READ_LIMIT + 1)
        return ChatResult(generations=[ChatGeneration(message=AIMessage(text))])


def write_conversation(messages: Sequence[BaseMessage]) -> str:
    """All messages, each behind a line that says whose it is."""
    return "\n\n".join(f"=== {ROLES.get(part.type, 'user')} ===\n\n{part.text}" for part in messages) + "\n"


def write_prompt(directory: Path, text: str) -> Path:
    """The file of a prompt, in the directory from now on. Raises UserError where it cannot be written."""
    mark = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]
    with explain_unwritable(directory):
        names = [path.name for path in directory.iterdir()]
        if known := [name for name in names if name.endswith(f"-{mark}.prompt.md")]:
            return directory / min(known)
        numbers = [int(match[1]) for name in names if (match := re.match(r"(\d+)-\w+\.prompt\.md$", name))]
        path = directory / f"{max(numbers, default=0) + 1:03d}-{mark}.prompt.md"
        write_text(path, f"{text}\n(Answer in {name_answer(path).name}, written aside and renamed.)\n")
    return path


def name_answer(prompt: Path) -> Path:
    """The file that answers a prompt's."""
    return prompt.with_name(prompt.name.removesuffix(".prompt.md") + ".answer.txt")


def find_answer(prompt: Path) -> Path | None:
    """The answer to a prompt: its own, or that to the same one by another number, as where two machines' files were put
    together; None before there is one."""
    _, _, mark = name_answer(prompt).name.partition("-")
    return min(prompt.parent.glob(f"*-{mark}"), default=None)
