"""From token ids to hidden states to losses, in chunks, never holding the logits of a whole window.

The first `lead` tokens of a window may be no text: what is predicted there counts in no loss.

Shape suffixes: B windows, T tokens, L those before the text, D hidden width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tools.base.errors import UserError
from tools.models.layers import find_device
from tools.models.positions import CHECKED

CHUNK = 128
"""Tokens whose logits are held at once."""

ROWS = 2
"""Tokens whose log-probabilities are made and compared at once on a CPU: so many lie in its cache, where those of a
chunk would be written to new pages of memory each time."""

CAUSAL = 0.02
"""Share of the largest hidden value that rounding may set two rows apart which begin with the same tokens."""


def compute_hidden(model: Any, ids_BT: Tensor) -> Tensor:
    """What the output head would read, (B, T, D) on the head's device, from one real forward of the whole model.

    The head itself runs on no token: its logits are the largest tensor of a forward, its weights often the largest
    matrix, and `tools.models.blocks` comes by here once for every block.
    """
    captured: list[Tensor] = []

    def keep_input(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        captured.append(inputs[0])
        return (inputs[0][..., :0, :],)

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(keep_input)
    try:
        model(input_ids=ids_BT, use_cache=False)
    finally:
        hook.remove()
    return captured[0].to(find_device(head))


def compute_logits(model: Any, hidden: Tensor) -> Tensor:
    """fp32 logits of hidden states, with the scale or soft cap of architectures that have one."""
    config = model.config.get_text_config()
    logits: Tensor = model.get_output_embeddings()(hidden).float()
    # Most have neither: to multiply with 1 is a pass over the largest tensor of all.
    if (scale := float(getattr(config, "logit_scale", None) or 1.0)) != 1:
        logits = logits * scale
    if (scaling := float(getattr(config, "logits_scaling", None) or 1.0)) != 1:
        logits = logits / scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


@torch.no_grad()
def check_readout(model: Any, ids_T: Tensor) -> None:
    """Compare `compute_logits` with the model's own.

    Raises UserError for an architecture it does not know, for logits that are not numbers, and where what comes after a
    token is known before it, so that perplexity would mean nothing.
    """
    if model.get_output_embeddings() is None:
        raise UserError("the model has no output head; a causal language model is needed")
    ids_BT = ids_T[None, :CHECKED]
    other_BT = torch.cat([ids_BT[:, :-1], ids_BT[:, :1]], 1)  # alike but for the last token, which begins it once more
    hidden_BTD = compute_hidden(model, torch.cat([ids_BT, other_BT]))
    ours = compute_logits(model, hidden_BTD[:1])
    theirs = model(input_ids=ids_BT, use_cache=False).logits.float().to(ours.device)
    if theirs.isnan().any():
        dtype = str(model.dtype).removeprefix("torch.")
        raise UserError(f"the logits of {type(model).__name__} are not numbers in {dtype}; use another --dtype")
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2):
        raise UserError(
            f"the logits of {type(model).__name__} are not head(hidden) with a known scale; it is not supported yet"
        )
    before_BTD = hidden_BTD[:, :-1].float()
    if (before_BTD[0] - before_BTD[-1]).abs().max() > CAUSAL * before_BTD.abs().max():
        raise UserError(f"{type(model).__name__} reads what comes after a token; a causal language model is needed")


class TokenLosses(NamedTuple):
    """Sums over the text of one window."""

    nll: float
    """Negative log-likelihood of its tokens but the first, nats."""
    kl: float
    """KL(dense || model) at all of its tokens, nats; 0 without a dense reference."""


def _chunks(*parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(part.split(CHUNK) for part in parts), strict=True)


def _shift(ids_T: Tensor) -> Tensor:
    """The token that follows each one; -100, which no loss counts, after the last."""
    return torch.cat([ids_T[1:], ids_T.new_full((1,), -100)])


@torch.no_grad()
def measure_losses(
    model: Any, ids_T: Tensor, dense_hidden_TD: Tensor | None, *, lead: int = 0
) -> tuple[TokenLosses, Tensor]:
    """Losses of one window, and its hidden states; the reference is the dense model's hidden states."""
    hidden_TD = compute_hidden(model, ids_T[None])[0]
    return sum_losses(model, ids_T, hidden_TD, dense_hidden_TD, lead=lead), hidden_TD


@torch.no_grad()
def sum_losses(
    model: Any, ids_T: Tensor, hidden_TD: Tensor, dense_hidden_TD: Tensor | None, *, lead: int = 0
) -> TokenLosses:
    """Losses of one window, whose hidden states are on the head's device; the reference as in `measure_losses`."""
    nll = kl = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
    dense_TD = hidden_TD if dense_hidden_TD is None else dense_hidden_TD.to(hidden_TD.device)
    text = hidden_TD[lead:], dense_TD[lead:], _shift(ids_T)[lead:].to(hidden_TD.device)
    rows = ROWS if hidden_TD.device.type == "cpu" else CHUNK
    for hidden, dense, targets in _chunks(*text):
        logits = compute_logits(model, hidden)
        others = logits if dense_hidden_TD is None else compute_logits(model, dense)
        chosen, diverged = [], []
        for part, other, of_part in zip(*(tensor.split(rows) for tensor in (logits, others, targets)), strict=True):
            log_p = torch.log_softmax(part, -1)
            chosen.append(log_p.gather(1, of_part.clamp(min=0)[:, None]))
            if dense_hidden_TD is not None:
                diverged.append(_diverge(other, log_p)[0])
        counted = targets.clamp(max=0)  # the only one that was gathered of each token, or -100
        own = torch.nn.functional.nll_loss(torch.cat(chosen), counted, ignore_index=-100, reduction="sum")
        nll = nll + own.double()
        kl = kl + torch.cat(diverged).double().sum() if diverged else kl
    return TokenLosses(float(nll), float(kl))


def _diverge(logits_TV: Tensor, log_p_TV: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(q || p) of each token, (T,); q, (T, V)), where the logits are of q."""
    log_q_TV = torch.log_softmax(logits_TV, -1)
    q_TV = log_q_TV.exp()
    return log_q_TV.sub_(log_p_TV).mul_(q_TV).sum(-1), q_TV


def begin_draw(device: torch.device, seed: int, window: int) -> torch.Generator:
    """What draws the labels of a window: each has its own, so that they do not depend on the order of the windows."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + window)


def hidden_gradients(
    model: Any,
    ids_T: Tensor,
    hidden_TD: Tensor,
    generator: torch.Generator,
    *,
    lead: int = 0,
    scales: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """(gradient of sum_t -log p(y_t) with y drawn from the model, gradient of the mean LM loss), both (T, D).

    The first gives the Fisher information of the model's own predictions, the second the paper's gradient score; both
    are zero before the text. Each loss is multiplied with its scale first. `hidden_TD` and the generator are on the
    head's device.
    """
    nothing_LD = torch.zeros_like(hidden_TD[:lead])
    fisher, language = [nothing_LD], [nothing_LD]
    for chunk, targets in _chunks(hidden_TD[lead:].detach(), _shift(ids_T)[lead:].to(hidden_TD.device)):
        hidden = chunk.requires_grad_()
        log_p = torch.log_softmax(compute_logits(model, hidden), -1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)[:, 0]
        drawn_loss = torch.nn.functional.nll_loss(log_p, drawn, reduction="sum")
        text_loss = torch.nn.functional.nll_loss(log_p, targets, ignore_index=-100, reduction="sum")
        text_loss = text_loss / (len(ids_T) - lead - 1)
        fisher.append(torch.autograd.grad(drawn_loss * scales[0], hidden, retain_graph=True)[0])
        language.append(torch.autograd.grad(text_loss * scales[1], hidden)[0])
    return torch.cat(fisher), torch.cat(language)


def diverge_gradients(
    model: Any, hidden_TD: Tensor, dense_hidden_TD: Tensor, *, lead: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(sum_t KL(dense || model) over the text, nats, fp64; its gradient at `hidden_TD` times `scale`, (T, D)).

    The reference is the dense model's hidden states; its logits and the model's own are held for one chunk at a time.
    The gradient is zero before the text.
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
    gradients = [torch.zeros_like(hidden_TD[:lead])]
    for chunk, dense in _chunks(hidden_TD[lead:].detach(), dense_hidden_TD[lead:].to(hidden_TD.device)):
        with torch.enable_grad():
            hidden = chunk.requires_grad_()
            logits = compute_logits(model, hidden)
        log_p = torch.log_softmax(logits.detach(), -1)
        kl, q = _diverge(compute_logits(model, dense), log_p)
        total += kl.double().sum()
        slope = log_p.exp_().sub_(q).mul_(scale)  # of the KL by the logits: p - q
        gradients.append(torch.autograd.grad(logits, hidden, slope)[0])
    return total, torch.cat(gradients)
