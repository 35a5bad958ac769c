"""independence.py: the layout that a model's rows need, and each row's loss in it beside its loss alone."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gradless import objectives
from gradless.errors import GradlessError
from gradless.independence import independence, keeps_copies
from gradless.objectives import Rows, TokenizedExample, collate

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ARCHITECTURES = {
    "llama": (SIZES, Rows.PACKED),
    "gpt2": ({"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}, Rows.PACKED),
    "mixtral": (SIZES | {"num_local_experts": 4}, Rows.PACKED),
    "gemma2": (SIZES | {"head_dim": 16}, Rows.PACKED),
    "opt": (SIZES | {"word_embed_proj_dim": 64, "ffn_dim": 96}, Rows.PADDED),  # takes position ids, and reads across them
    "bloom": ({"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}, Rows.PADDED),
    "mamba": ({"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, Rows.PADDED),
    "jamba": (SIZES | {"num_hidden_layers": 8, "num_experts": 4, "mamba_d_state": 8, "use_mamba_kernels": False}, Rows.PADDED),
    "minimax": (SIZES | {"num_local_experts": 4, "head_dim": 16}, Rows.PADDED),  # `linear_attention`
    "llama4_text": (SIZES | {"num_local_experts": 2, "head_dim": 16, "intermediate_size_mlp": 96}, Rows.PADDED),  # chunks
    "bert-generation": (SIZES | {"is_decoder": False}, Rows.ALONE),  # sees what comes after, and so what fills a row up
}


def build(kind, sizes, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=dtype).eval()


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_loss_in_its_batch_that_it_has_alone(kind, dtype):
    sizes, rows = ARCHITECTURES[kind]
    model = build(kind, sizes, dtype)
    assert independence(model).rows is rows
    generator = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(5, 120, (n,), generator=generator).tolist()) for n in (3, 17, 9, 40, 12)]
    examples = [TokenizedExample((each[:2],), (each[2:],), 0) for each in ids]
    with torch.inference_mode():
        together = objectives.losses(model, collate(examples, rows=rows))[0]
        alone = torch.cat([objectives.losses(model, collate([each], rows=Rows.PADDED))[0] for each in examples])
    assert torch.allclose(together, alone, atol=1e-5 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("kind", ["mixtral", "jamba"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_rounding_of_experts_is_no_leak(kind, threads):
    """Other neighbours go to other experts, whose products have other shapes, which two threads round otherwise."""
    sizes, rows = ARCHITECTURES[kind]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert independence(build(kind, sizes)).rows is rows
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "dtype"), [("jamba", torch.bfloat16), ("bert-generation", torch.bfloat16)])
def test_a_leak_that_is_smaller_than_the_rounding_is_seen(kind, dtype):
    """Packed, A's scores are within bf16's rounding of A's alone; but they follow their neighbours' tokens."""
    model = build(kind, ARCHITECTURES[kind][0], dtype)
    assert independence(model).rows is not Rows.PACKED


def test_frequencies_that_follow_the_longest_row_are_not_shared():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert independence(build("llama", SIZES | {"rope_parameters": scaling})).rows is Rows.ALONE


@pytest.mark.parametrize(("longer", "rows"), [(1.0, Rows.PACKED), (4.0, Rows.ALONE)])
def test_factors_that_are_the_same_at_every_length_choose_for_no_row(longer, rows):
    """A GGUF's scalings are stated like this (Llama 3's `rope_freqs`, yarn): two sets of factors that are one."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [longer] * 8}
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, "attention_factor": 1.0}
    assert independence(build("llama", SIZES | {"rope_parameters": scaling | factors})).rows is rows


def test_a_model_that_is_not_the_same_twice_is_refused():
    model = build("llama", SIZES)
    model.model.norm.register_forward_hook(lambda _module, _inputs, y: y + 0.1 * torch.randn_like(y))
    with pytest.raises(GradlessError, match="scores one row differently from one forward to the next"):
        independence(model)


def test_at_most_four_forwards_are_made_once_and_dropout_is_off_in_them():
    for kind, most in {"llama": 3, "opt": 4, "mamba": 2, "jamba": 4}.items():
        model = build(kind, ARCHITECTURES[kind][0]).train()
        forwards = []
        model.register_forward_pre_hook(lambda module, _inputs, forwards=forwards: forwards.append(module.training))
        assert independence(model) is independence(model)
        assert len(forwards) == most
        assert not any(forwards)
        assert model.training


def test_copies_are_kept_apart_by_masks_only_where_the_model_heeds_them():
    assert keeps_copies(build("llama", ARCHITECTURES["llama"][0]))
    assert not keeps_copies(build("gemma2", ARCHITECTURES["gemma2"][0]))
    assert not keeps_copies(build("opt", ARCHITECTURES["opt"][0]))


def test_logits_that_do_not_come_from_the_head_are_refused():
    model = build("llama", SIZES)
    model.get_output_embeddings = lambda: torch.nn.Linear(64, 128)
    with pytest.raises(GradlessError, match="does not compute its logits by its head alone"):
        independence(model)
