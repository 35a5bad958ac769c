"""What stands between linear layers: the compiled passes against the reference, and models with and without them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from gradless import kernels
from gradless.formats.gguf_model import load_gguf
from gradless.formats.quantized import dequantized
from gradless.fusing import ATTENTION, _linear, fuse
from gradless.kernels import reference
from gradless.layers import QuantLinear
from tests.tiny import tiny_gguf

cpu = pytest.importorskip("gradless.kernels.cpu", reason="the C++ kernels were not built", exc_type=OSError)

ROUNDING = 2.0**-8
"""Of a bf16, relative."""


def values(*shape, seed, size=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()


def near(ours, theirs, scale, roundings=2):
    return bool(((ours.float() - theirs.float()).abs() <= roundings * ROUNDING * scale + 1e-30).all())


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9), st.integers(1, 200), st.sampled_from([0.0, 1.0]), st.sampled_from([1e-20, 1.0, 1e15]), st.integers(0, 99)
)
def test_rms_norm(n, d, plus, size, seed):
    x, weight = values(n, d, seed=seed, size=size), values(d, seed=seed + 1)
    ours, theirs = (ops.rms_norm(x, weight, 1e-5, plus) for ops in (cpu, reference))
    assert near(ours, theirs, theirs.float().abs())


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.booleans(), st.sampled_from([0.1, 1.0, 30.0, 1e4]), st.integers(0, 99))
def test_gate(n, gelu, size, seed):
    x, up = values(n, seed=seed, size=size), values(n, seed=seed + 1)
    ours, theirs = (ops.gate(x, up, gelu=gelu) for ops in (cpu, reference))
    least = 0.01 * up.float().abs()  # far below zero the reference's tanh cancels where the compiled form does not
    assert near(ours, theirs, theirs.float().abs() + least)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 70),
    st.sampled_from([32, 64, 96]),
    st.booleans(),
    st.sampled_from([0.1, 1.0, 8.0]),
    st.integers(0, 99),
)
def test_attention(batch, heads, shared, length, size, masked, spread, seed):
    q = values(batch, length, heads * shared, size, seed=seed, size=spread).transpose(1, 2)
    k, v = (values(batch, length, heads, size, seed=seed + i).transpose(1, 2) for i in (1, 2))
    mask = None
    if masked:  # sequences end to end
        owner = torch.randint(3, (batch, 1, length), generator=torch.Generator().manual_seed(seed)).sort(-1).values
        mask = (owner[..., :, None] == owner[..., None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    ours, theirs = (ops.attention(q, k, v, mask, size**-0.5) for ops in (cpu, reference))
    assert ours.shape == (batch, length, heads * shared, size)
    assert near(ours, theirs, v.float().abs().max())


def test_a_token_that_sees_none_gets_the_mean():
    q, k, v = (values(1, 2, 5, 32, seed=i) for i in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[0] = False
    assert near(cpu.attention(q, k, v, mask, 1.0), reference.attention(q, k, v, mask, 1.0), v.float().abs().max())


@pytest.mark.parametrize("passes", ["rms_norm", "gate"])
def test_what_is_not_finite_stays_so(passes):
    x, other = values(4, 64, seed=0), values(4, 64, seed=1)
    x[1, 3] = torch.nan
    y = cpu.rms_norm(x, other[0], 1e-5, 0.0) if passes == "rms_norm" else cpu.gate(x, other, gelu=False)
    assert y[[0, 2, 3]].isfinite().all()
    assert y[1].isnan().any()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_a_fused_model_is_the_same_model(architecture, tmp_path):
    """As far from the fp32 model as transformers' own bf16 model is, on packed sequences too."""
    loaded = load_gguf(tiny_gguf(tmp_path / "tiny.gguf", architecture))
    dense = dequantized(loaded)
    assert loaded.model.config._attn_implementation == ATTENTION
    assert dense.config._attn_implementation == "sdpa"
    fused = {type(module).__name__ for module in loaded.model.modules() if "forward" in vars(module)}
    assert any(name.endswith("RMSNorm") for name in fused)
    assert any(name.endswith("MLP") for name in fused)
    ids = torch.randint(20, (2, 48), generator=torch.Generator().manual_seed(0))
    apart = torch.cat([torch.arange(20), torch.arange(28)]).expand(2, -1)
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "position_ids": apart}):
        with torch.inference_mode():
            own, theirs = (model(**inputs, use_cache=False).logits.float() for model in (loaded.model, dense))
            exact = dequantized(loaded).float()(**inputs, use_cache=False).logits
        assert (own - exact).square().mean() <= 2 * (theirs - exact).square().mean()


def test_fused_modules_leave_gradients_and_caches_to_their_own_forwards(tiny):
    loaded = load_gguf(tiny)
    model = dequantized(loaded)
    fuse(model)
    assert model.config._attn_implementation == ATTENTION
    ids = torch.randint(20, (1, 12), generator=torch.Generator().manual_seed(0))
    model.requires_grad_(True)(ids).logits.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.requires_grad_(False).model.layers[0].input_layernorm.weight.requires_grad_(True).grad = None
    model(ids).logits.float().square().mean().backward()
    assert model.model.layers[0].input_layernorm.weight.grad.abs().sum() > 0
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, dequantized(loaded).generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 3000), st.booleans(), st.integers(0, 99))
def test_a_dense_layer_as_fp32(tokens, rows, biased, seed):
    """On processors that have no product of bf16: rounded once, after the sum."""
    layer = nn.Linear(64, rows, bias=biased).bfloat16().requires_grad_(False)
    x = values(2, tokens, 64, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "widens_bf16", lambda _device: True)
        ours = _linear(layer, x)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if biased else 0)
    assert ours.shape == exact.shape
    assert near(ours, exact, exact.abs() + 1, roundings=2)


def test_nothing_is_fused_without_compiled_kernels(tiny, monkeypatch):
    monkeypatch.setattr(kernels, "name", lambda _device: "torch")
    loaded = load_gguf(tiny)
    assert loaded.model.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(m) for m in loaded.model.modules() if not isinstance(m, QuantLinear))


def test_a_model_in_fp32_is_left_alone(tiny):
    dense = dequantized(load_gguf(tiny)).float()
    fuse(dense)
    assert dense.config._attn_implementation == "sdpa"
    assert isinstance(AutoModelForCausalLM.from_config(dense.config), type(dense))
