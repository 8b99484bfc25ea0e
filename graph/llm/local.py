"""A chat model in this process: any model source of a run, its answers held to a JSON schema by a grammar.

llguidance (github.com/guidance-ai/llguidance) says before every token which ones may follow, so
that even a tiny model answers with JSON that fits.
"""

import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.exceptions import ContextOverflowError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from pydantic import PrivateAttr

from graph.config import RunConfig
from graph.llm.attempts import describe_terms
from graph.llm.ladder import Method
from tools.base.errors import UserError
from tools.models.load import load_model, locate_model
from tools.models.positions import count_positions

MAX_NEW_TOKENS = 1024
"""Tokens of one answer, where the config does not say fewer."""
MIN_NEW_TOKENS = 128
"""A prompt that leaves less of the context is refused."""
CLOSING_SHARE = 0.25
"""The last part of the tokens, in which an answer is brought to its end."""
MAX_ITEMS, MAX_CHARACTERS, DECIMALS, MAX_NUMBER = 8, 300, 4, 1_000_000
"""Of a list, a string and a number in an answer, where the schema does not say less. A weak model repeats itself to the
last item that it may give, and writes digits for ever."""
MAX_LOADED = 2
"""Models kept in memory: a planner and a reflector."""


@dataclass
class _Loaded:
    """A model that stays in memory between two calls."""

    model: Any
    tokenizer: Any
    grammar_tokenizer: Any
    closers: np.ndarray[Any, np.dtype[np.bool_]]
    """For every token, whether it only ends strings, lists and objects."""
    lock: threading.Lock = field(default_factory=threading.Lock)


_loaded: dict[tuple[str, str, str, bool], _Loaded] = {}


def check_local(source: str) -> None:
    """Refuse, before anything is loaded, what certainly cannot answer. Raises UserError."""
    if importlib.util.find_spec("llguidance") is None:
        raise UserError(f"local:{source} needs a package that is not installed; try: pip install llguidance")
    locate_model(source)


def open_local(source: str, config: RunConfig) -> BaseChatModel:
    """The chat model `local:SOURCE`, loaded unless it is already; the config says where and in which number format.

    Raises UserError when it cannot be loaded.
    """
    check_local(source)
    key = (source, config.dtype, config.device, config.trust_remote_code)
    if key not in _loaded:
        while len(_loaded) >= MAX_LOADED:
            del _loaded[next(iter(_loaded))]
        _loaded[key] = _load(config.model_copy(update={"model": source}))
    longest = min(MAX_NEW_TOKENS, config.agent_answer_tokens)
    return LocalChat.over(
        _loaded[key],
        name=f"local:{source}",
        temperature=config.agent_temperature,
        seed=config.seed,
        max_tokens=longest,
        metadata=describe_terms(0, longest),
    )


def close_local() -> None:
    """Let go of every local model."""
    _loaded.clear()


def _load(config: RunConfig) -> _Loaded:
    from llguidance.hf import from_tokenizer
    from transformers import GenerationConfig

    model, tokenizer = load_model(config)
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    if ends is None:
        raise UserError(f"model {config.model!r} has no token that ends an answer")
    ends = ends if isinstance(ends, list) else [ends]
    # Without the model's own settings, such as a penalty on repeating what JSON has to repeat.
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[0])
    size = max(len(tokenizer), model.config.get_text_config().vocab_size)
    try:
        grammar_tokenizer = from_tokenizer(tokenizer, n_vocab=size, eos_token=ends)
    except ValueError as error:
        raise UserError(f"the tokenizer of model {config.model!r} cannot be held to a grammar: {error}") from error
    texts = (grammar_tokenizer.decode_bytes([token]) for token in range(size))
    closers = np.array([bool(text) and not text.strip(b'"]}') for text in texts])
    return _Loaded(model, tokenizer, grammar_tokenizer, closers)


class LocalChat(BaseChatModel):
    """A loaded model as LangChain sees it. `bind(schema=...)` holds its answer to a JSON schema."""

    methods: ClassVar[tuple[Method, ...]] = ("grammar",)
    temperature: float | None = None
    seed: int = 0
    max_tokens: int = MAX_NEW_TOKENS
    _loaded: _Loaded = PrivateAttr()

    @classmethod
    def over(cls, loaded: _Loaded, **fields: Any) -> "LocalChat":
        """The chat model over a loaded one."""
        chat = cls(**fields)
        chat._loaded = loaded
        return chat

    @property
    def _llm_type(self) -> str:
        return "billhook-local"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        *,
        schema: dict[str, Any] | None = None,
        **_: Any,
    ) -> ChatResult:
        """One answer: the likeliest tokens, or at a temperature drawn from the config's seed.

        Raises ContextOverflowError when the prompt leaves too little of the model's context.
        """
        loaded = self._loaded
        prompt = _encode(loaded.tokenizer, messages)
        limit = _count_room(loaded.model, len(prompt), self.max_tokens)
        hold = [_Grammar(loaded, schema, len(prompt), limit)] if schema else []
        with loaded.lock:  # two of Studio's runs may share it
            tokens = _decode(loaded.model, prompt, limit, hold, self.temperature, self.seed)
        ended = tokens[-1] in loaded.model.generation_config.eos_token_id
        reply = AIMessage(
            loaded.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            usage_metadata={
                "input_tokens": len(prompt),
                "output_tokens": len(tokens),
                "total_tokens": len(prompt) + len(tokens),
            },
            response_metadata={"finish_reason": "stop" if ended else "length"},
        )
        return ChatResult(generations=[ChatGeneration(message=reply)])


def _encode(tokenizer: Any, messages: Sequence[BaseMessage]) -> list[int]:
    """Tokens of the conversation, up to where the model's answer begins."""
    roles = {"system": "system", "ai": "assistant"}
    turns = [{"role": roles.get(message.type, "user"), "content": str(message.text)} for message in messages]
    if tokenizer.chat_template is None:
        text = "".join(f"{turn['role'].capitalize()}: {turn['content']}\n\n" for turn in turns) + "Assistant: "
        return list(tokenizer(text)["input_ids"])
    text = _apply_template(tokenizer, turns)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _apply_template(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    from jinja2 import TemplateError

    # The grammar leaves no room for thoughts; templates that know none ignore the option.
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    try:
        return str(tokenizer.apply_chat_template(turns, **options))
    except TemplateError:  # Gemma's has no role for the system
        system, user, *rest = turns
        both = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
        return str(tokenizer.apply_chat_template([both, *rest], **options))


def _count_room(model: Any, prompt: int, longest: int) -> int:
    """Tokens that an answer may have, `longest` at most."""
    context = count_positions(model)
    if context is None:
        return longest
    if prompt + MIN_NEW_TOKENS > context:
        raise ContextOverflowError(
            f"it has {prompt:,} tokens, and with {MIN_NEW_TOKENS} for an answer more than the context of {context:,}"
        )
    return min(longest, context - prompt)


def _decode(
    model: Any,
    prompt: list[int],
    limit: int,
    hold: Sequence["_Grammar"],
    temperature: float | None,
    seed: int,
) -> list[int]:
    """The tokens of an answer, the one that ends it among them unless `limit` came first."""
    import torch

    prompt_1T = torch.tensor([prompt], device=model.device)
    options: dict[str, Any] = {"do_sample": False}
    if temperature:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(seed)
        answer_1T = model.generate(
            prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            max_new_tokens=limit,
            logits_processor=list(hold),
            **options,
        )
    return list(answer_1T[0, len(prompt) :].tolist())


class _Grammar:
    """A logits processor of `generate`: rules out every token after which the answer cannot fit the schema."""

    def __init__(self, loaded: _Loaded, schema: dict[str, Any], prompt: int, limit: int) -> None:
        from llguidance import LLMatcher

        # Without white space, of which a weak model may write no end.
        options: Any = {"whitespace_flexible": False}
        grammar = LLMatcher.grammar_from_json_schema(bound_schema(schema), overrides=options)
        self.matcher = LLMatcher(loaded.grammar_tokenizer, grammar)
        self.closers, self.read = loaded.closers, prompt
        self.closing = prompt + limit - round(CLOSING_SHARE * limit)
        self._refuse_error()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """`scores` (1, vocabulary) of the next token, minus infinity where it may not follow `input_ids` (1, T)."""
        import torch

        tokens = input_ids[0, self.read :].tolist()
        self.read += len(tokens)
        self.matcher.consume_tokens(tokens)
        self._refuse_error()
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: scores.shape[1]].astype(bool)
        ending = allowed & self.closers[: len(allowed)]
        if self.read >= self.closing and ending.any():
            allowed = ending
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)

    def _refuse_error(self) -> None:
        if self.matcher.is_error():
            raise RuntimeError(self.matcher.get_error())


def bound_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema that allows no more than this one, and nothing without end.

    Objects have no unknown fields, and lists, strings and numbers keep to the bounds above.
    """
    bounded: dict[str, Any] = _bound(schema)
    return bounded


def _bound(node: Any) -> Any:
    if isinstance(node, list):
        return [_bound(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _bound(value) for key, value in node.items()}
    kind = node.get("type")
    if kind == "object" and "properties" in node:
        node["additionalProperties"] = False
    if kind == "array":
        node["maxItems"] = min(MAX_ITEMS, node.get("maxItems", MAX_ITEMS))
    if kind == "string" and not node.keys() & {"enum", "const", "pattern"}:
        node["maxLength"] = min(MAX_CHARACTERS, node.get("maxLength", MAX_CHARACTERS))
    if kind in ("number", "integer"):
        if not node.keys() & {"minimum", "exclusiveMinimum"}:
            node["minimum"] = -MAX_NUMBER
        if not node.keys() & {"maximum", "exclusiveMaximum"}:
            node["maximum"] = MAX_NUMBER
    if kind == "number":
        node.setdefault("multipleOf", 10.0**-DECIMALS)
    return node
