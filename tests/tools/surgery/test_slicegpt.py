"""SliceGPT: the model that projects beside the narrow one, whose matrices are rotated and sliced one by one."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.cuts import IDS, compute_logits, make_config, make_model
from tests.tiny import make_tiny_model
from tools.base.errors import UserError
from tools.base.progress import ignore_progress
from tools.surgery.parts import count_weights
from tools.surgery.slicegpt import DAMPING, Sliced, build_sliced, count_sliced, slice_states


def make_llama(**options: Any) -> Any:
    return make_model(make_config("llama", num_hidden_layers=3, intermediate_size=256, **options))


def shrink(layer: nn.Linear, into: Tensor | None, out_of: Tensor | None, scale: Tensor | None = None) -> nn.Linear:
    """Rotated and sliced: `into` are the components that it reads, (D, K), `out_of` those that it gives."""
    weight = layer.weight.double() * (1 if scale is None else scale.double())
    weight = weight if into is None else weight @ into.double()
    weight = weight if out_of is None else out_of.double().T @ weight
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight.float())
    return made


class Norm(nn.Module):
    """RMSNorm over a narrow state, by the wide model's width and without weights."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / self.width + self.eps)


def compute_narrow(model: Any, sliced: Sliced) -> tuple[Tensor, int]:
    """(logits of the narrow model, put together of transformers' own modules; its parameters)."""
    model = copy.deepcopy(model)
    config, base = model.config, model.model
    norm = Norm(config.hidden_size, config.rms_norm_eps)
    into, used = sliced.embedded_DK, 0
    words = base.embed_tokens.weight @ into
    hidden = words[IDS]
    positions = torch.arange(IDS.shape[1])[None]
    rotary = base.rotary_emb(hidden, positions)
    used += words.numel()
    for block, layer in enumerate(base.layers):
        middle = sliced.attended[block]
        behind = sliced.passed[block] if block < len(sliced.passed) else None
        first, second = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, shrink(getattr(layer.self_attn, name), into, None, first))
        layer.self_attn.o_proj = shrink(layer.self_attn.o_proj, None, middle)
        for name in ("gate_proj", "up_proj"):
            setattr(layer.mlp, name, shrink(getattr(layer.mlp, name), middle, None, second))
        layer.mlp.down_proj = shrink(layer.mlp.down_proj, None, behind)
        over = into.T @ middle
        back = middle.T if behind is None else middle.T @ behind
        mask = torch.full((IDS.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        attended, _ = layer.self_attn(norm(hidden), position_embeddings=rotary, attention_mask=mask)
        hidden = hidden @ over + attended
        hidden = hidden @ back + layer.mlp(norm(hidden))
        inner = [p.numel() for part in (layer.self_attn, layer.mlp) for p in part.parameters()]
        used += sum(inner) + over.numel() + back.numel()
        into = behind
    head = model.lm_head.weight * base.norm.weight
    return norm(hidden) @ head.T, used + head.numel()


@pytest.mark.parametrize("remove", [0.1, 0.4])
@torch.no_grad()
def test_it_computes_what_the_narrow_model_does(remove: float) -> None:
    model = make_llama()
    sliced = slice_states(model, remove, IDS, ignore_progress)
    built = build_sliced(model, sliced)
    before = compute_logits(model)
    logits, parameters = compute_narrow(model, sliced)
    torch.testing.assert_close(compute_logits(built), logits, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits, before, atol=1e-2)
    width = sliced.embedded_DK.shape[1]
    assert parameters == count_sliced(model, [width])[width]
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert sliced.removed == pytest.approx((whole - parameters) / count_weights(model))
    assert [len(sliced.attended), len(sliced.passed)] == [3, 2]
    assert torch.equal(compute_logits(model), before), "the dense model is left as it was"


@torch.no_grad()
def test_components_are_those_of_the_largest_variance_of_what_really_passes() -> None:
    model = make_llama()
    sliced = slice_states(model, 0.3, IDS, ignore_progress)
    embedded = model.model.embed_tokens(IDS).flatten(0, 1).double()
    moment = embedded.T @ embedded
    moment += DAMPING * moment.diagonal().mean() * torch.eye(len(moment))
    values, vectors = torch.linalg.eigh(moment)
    width = sliced.embedded_DK.shape[1]
    largest = vectors[:, values.argsort(descending=True)[:width]]
    assert torch.allclose(largest @ largest.T, (sliced.embedded_DK @ sliced.embedded_DK.T).double(), atol=1e-5)
    built = build_sliced(model, sliced)
    read: list[Tensor] = []
    built.model.layers[1].register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
    compute_logits(built)
    kept = sliced.passed[0]
    torch.testing.assert_close(read[0] @ kept @ kept.T, read[0], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_sliced_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="OPTForCausalLM has LayerNorm in its blocks; SliceGPT is here for RMSNorm"):
        slice_states(make_tiny_model("opt"), 0.2, IDS, ignore_progress)
    with pytest.raises(UserError, match="Gemma3ForCausalLM do not add up what attention and MLP give; SliceGPT"):
        slice_states(make_tiny_model("gemma3"), 0.2, IDS, ignore_progress)
    with pytest.raises(UserError, match="makes no smaller LlamaForCausalLM of this one"):
        slice_states(make_llama(vocab_size=30_000, tie_word_embeddings=True), 0.01, IDS, ignore_progress)
