"""Losses and gradients in chunks, against the plain way: all logits at once, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny import ARCHITECTURES, HIDDEN, VOCABULARY, make_tiny_model
from tools.base.errors import UserError
from tools.models.readout import CHUNK, check_readout, compute_hidden, compute_logits, hidden_gradients, measure_losses

LENGTH = CHUNK + 22
"""More than one chunk, the last one short."""


def make_ids(seed: int = 0, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def plain_logits(model: Any, ids_T: Tensor) -> Tensor:
    return model(input_ids=ids_T[None], use_cache=False).logits[0].double()  # type: ignore[no-any-return]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_of_hidden_is_the_models_own_logits(architecture: str) -> None:
    model, ids = make_tiny_model(architecture), make_ids()
    with torch.no_grad():
        hidden = compute_hidden(model, ids[None])
        logits = compute_logits(model, hidden)
    assert hidden.shape == (1, LENGTH, HIDDEN)
    assert logits.dtype == torch.float32
    theirs = plain_logits(model, ids)
    assert theirs.std() > 0.5  # or nothing is compared
    torch.testing.assert_close(logits[0].double(), theirs, rtol=1e-5, atol=1e-5)
    check_readout(model, ids)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_soft_cap_does_something() -> None:
    model, ids = make_tiny_model("gemma3"), make_ids()
    head = F.linear(compute_hidden(model, ids[None]), model.get_output_embeddings().weight)
    assert (compute_logits(model, compute_hidden(model, ids[None])) - head).abs().max() > 0.5


def test_an_unknown_scale_is_refused() -> None:
    model, ids = make_tiny_model("gemma3"), make_ids()
    forward = model.forward

    def scaled(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = output.logits * 1.3
        return output

    model.forward = scaled
    with pytest.raises(UserError, match=r"the logits of Gemma3ForCausalLM are not head\(hidden\) with a known scale"):
        check_readout(model, ids)


def test_logits_that_are_not_numbers_are_refused() -> None:
    model = make_tiny_model("llama").half()
    model.model.layers[1].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(
        UserError, match=r"^the logits of LlamaForCausalLM are not numbers in float16; use another --dty"
    ):
        check_readout(model, make_ids())


def test_a_model_that_reads_what_comes_after_is_refused() -> None:
    model = make_tiny_model("llama")
    embed = model.model.embed_tokens
    embed.register_forward_hook(lambda _module, _inputs, x_BTD: x_BTD + x_BTD.mean(1, keepdim=True))
    with pytest.raises(UserError, match=r"^LlamaForCausalLM reads what comes after a token; a causal language model"):
        check_readout(model, make_ids())
    check_readout(model, torch.full((20,), 3))  # which says nothing


def test_a_model_without_a_head_is_refused() -> None:
    model = make_tiny_model("llama").model
    with pytest.raises(UserError, match="the model has no output head; a causal language model is needed"):
        check_readout(model, make_ids())


def test_the_hook_goes_even_when_the_model_fails() -> None:
    model = make_tiny_model("llama")
    with pytest.raises(IndexError):
        compute_hidden(model, torch.tensor([[VOCABULARY]]))
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("length", [2, CHUNK, LENGTH])
def test_losses_are_plain_cross_entropy_and_kl(architecture: str, length: int) -> None:
    dense, other, ids = make_tiny_model(architecture), make_tiny_model(architecture), make_ids(length=length)
    with torch.no_grad():
        for parameter in other.model.parameters() if hasattr(other, "model") else other.transformer.h.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        # The reference is the dense model's hidden states through one and the same head.
        dense.get_output_embeddings().weight.copy_(other.get_output_embeddings().weight)
    _, dense_hidden = measure_losses(dense, ids, None)
    losses, hidden = measure_losses(other, ids, dense_hidden)
    log_q, log_p = plain_logits(dense, ids).log_softmax(-1), plain_logits(other, ids).log_softmax(-1)
    assert losses.nll == pytest.approx(float(F.nll_loss(log_p[:-1], ids[1:], reduction="sum")), rel=1e-5)
    assert losses.kl == pytest.approx(float((log_q.exp() * (log_q - log_p)).sum()), rel=1e-4)
    assert losses.kl > 0
    assert torch.equal(hidden, compute_hidden(other, ids[None])[0])


def test_kl_to_itself_is_zero_and_without_reference_too() -> None:
    model, ids = make_tiny_model("llama"), make_ids()
    losses, hidden = measure_losses(model, ids, None)
    assert losses.kl == 0
    again, _ = measure_losses(model, ids, hidden)
    assert abs(again.kl) < 1e-5 and again.nll == losses.nll


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_equal_autograd_through_all_logits(architecture: str) -> None:
    model, ids = make_tiny_model(architecture), make_ids()
    with torch.no_grad():
        hidden = compute_hidden(model, ids[None])[0]
    fisher, language = hidden_gradients(model, ids, hidden, torch.Generator().manual_seed(7))

    # The same labels: drawn chunk by chunk, the tokens of a chunk together.
    generator, labels = torch.Generator().manual_seed(7), []
    for chunk in hidden.split(CHUNK):
        labels.append(torch.multinomial(compute_logits(model, chunk).softmax(-1), 1, generator=generator)[:, 0])
    plain = hidden.detach().double().requires_grad_()
    head = model.get_output_embeddings().weight.double()
    logits = plain @ head.T
    if architecture == "gemma3":
        logits = 5 * torch.tanh(logits / 5)
    log_p = logits.log_softmax(-1)
    expected = torch.autograd.grad(F.nll_loss(log_p, torch.cat(labels), reduction="sum"), plain, retain_graph=True)[0]
    torch.testing.assert_close(fisher.double(), expected, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(F.nll_loss(log_p[:-1], ids[1:]), plain)[0]
    torch.testing.assert_close(language.double(), expected, rtol=1e-4, atol=1e-7)
    assert not language[-1].any() and fisher[-1].any()


def test_no_loss_begins_before_the_text() -> None:
    model, ids = make_tiny_model("llama"), make_ids(length=CHUNK + 1)
    with torch.no_grad():
        hidden = compute_hidden(model, ids[None])[0]
    ours = hidden_gradients(model, ids, hidden, torch.Generator().manual_seed(7), lead=1)
    text = hidden_gradients(model, ids[1:], hidden[1:], torch.Generator().manual_seed(7))
    for with_lead, without in zip(ours, text, strict=True):
        assert not with_lead[0].any() and torch.equal(with_lead[1:], without)


def test_drawn_labels_depend_on_the_generator_alone() -> None:
    model, ids = make_tiny_model("llama"), make_ids()
    with torch.no_grad():
        hidden = compute_hidden(model, ids[None])[0]
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, second, third = (hidden_gradients(model, ids, hidden, generator)[0] for generator in generators)
    assert torch.equal(first, second) and not torch.equal(first, third)
