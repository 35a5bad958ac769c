"""Scores, packing and metrics."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gradless import evaluation, objectives
from gradless.errors import GradlessError
from gradless.formats.gguf_model import load_gguf
from gradless.formats.quantized import dequantized
from gradless.objectives import Example, Rows, TokenizedExample, collate, tokenize
from tests.tiny import tiny_gguf


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def loaded(request, tmp_path_factory):
    path = tiny_gguf(tmp_path_factory.mktemp(request.param) / "tiny.gguf", request.param)
    return load_gguf(path, dtype=torch.float32)


def plain_score(model, prompt, completion):
    """A candidate's mean token log-probability, from a forward of its own over the whole sequence and vocabulary."""
    ids = torch.tensor([[*prompt, *completion]])
    logprobs = F.log_softmax(model(ids).logits[0].float(), dim=-1)
    picked = [logprobs[len(prompt) + i - 1, token] for i, token in enumerate(completion)]
    return torch.stack(picked).mean()


@torch.inference_mode()
def test_packed_scores_are_those_of_sequences_alone(loaded):
    examples = [
        TokenizedExample(((5, 6, 7),) * 2, ((8, 9), (10,)), 0),
        TokenizedExample(((1, 2),) * 3, ((3,), (4, 5, 6), (7,)), 2),
        TokenizedExample((tuple(range(50)),), ((60, 61),), 0),
    ]
    for rows in Rows:
        batch = collate(examples, rows=rows)
        assert batch.words is None
        for example, scores in zip(examples, objectives.scores(loaded.model, batch), strict=True):
            alone = [plain_score(loaded.model, p, c) for p, c in zip(example.prompts, example.completions, strict=True)]
            assert torch.allclose(scores, torch.stack(alone), atol=1e-4)


@torch.inference_mode()
def test_single_word_candidates_need_one_sequence_and_their_own_logits_only(loaded):
    examples = [TokenizedExample(((i, i + 1, 9),) * 2, ((20,), (30,)), i % 2) for i in range(5)]
    batch = collate(examples)
    assert batch.words.tolist() == [20, 30]
    assert len(batch.counts) == 5
    for example, scores in zip(examples, objectives.scores(loaded.model, batch), strict=True):
        alone = torch.stack([plain_score(loaded.model, example.prompts[0], c) for c in example.completions])
        assert torch.allclose(scores.log_softmax(0), alone.log_softmax(0), atol=1e-4)
    losses, right = objectives.losses(loaded.model, batch)
    assert losses.shape == right.shape == (5,)


def test_a_dense_head_computes_its_candidates_alone_in_fp32(loaded):
    """A bf16 logit of 16 has steps of 1/8; the scores of single words must not."""
    dense = dequantized(loaded).to(torch.bfloat16)
    examples = [TokenizedExample(((3, 4, 9),) * 2, ((20,), (30,)), 1)]
    (scores,) = objectives.scores(dense, collate(examples))
    hidden = dense.model(torch.tensor([examples[0].prompts[0]])).last_hidden_state[0, -1]
    head = dense.get_output_embeddings()
    expected = head.weight[list(examples[0].words)].float() @ hidden.float()
    assert scores.dtype is torch.float32
    assert torch.allclose(scores, expected, atol=1e-5)
    assert "forward" not in vars(head)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=30), st.sampled_from([0, 64]))
def test_packing_places_every_sequence_once_without_overlap(lengths, row_length):
    taken = set()
    for (row, start), length in zip(objectives._pack(lengths, row_length), lengths, strict=True):
        cells = {(row, start + i) for i in range(length)}
        assert not cells & taken
        taken |= cells
    if row_length:
        assert max(column for _, column in taken) < max(row_length, *lengths)


def test_a_space_joins_prompt_and_answer_unless_white_space_is_there(loaded):
    text = {}
    for prompt in ("It was", "Answer?\n"):
        made = tokenize(Example(prompt, ("th",)), loaded.tokenizer, context=128)
        text[prompt] = loaded.tokenizer.decode([*made.prompts[0], *made.completions[0]])
    assert text == {"It was": "It was th", "Answer?\n": "Answer?\nth"}


def test_a_prompt_longer_than_the_context(loaded):
    example = Example("a" * 200, ("b", "c"), 1)
    with pytest.raises(GradlessError, match="longer than the model's context of 128"):
        tokenize(example, loaded.tokenizer, context=128)
    made = tokenize(example, loaded.tokenizer, context=128, max_length=64)
    assert len(made) == 64


def test_empty_answers_and_prompts(loaded):
    with pytest.raises(GradlessError, match="an answer is empty"):
        tokenize(Example("text\n", ("",)), loaded.tokenizer, context=128)
    with pytest.raises(GradlessError, match="a prompt is empty"):
        tokenize(Example("", ("text",), verbatim=True), loaded.tokenizer, context=128)


def test_completions_follow_their_prompt_as_they_are(loaded):
    made = tokenize(Example("def f(", ("x)",), verbatim=True), loaded.tokenizer, context=128)
    assert loaded.tokenizer.decode([*made.prompts[0], *made.completions[0]]) == "def f(x)"


def test_macro_f1_and_accuracy(loaded):
    examples = [TokenizedExample(((i, 9),) * 2, ((20,), (30,)), i % 2) for i in range(8)]
    metrics = evaluation.evaluate(loaded.model, examples, loaded.tokenizer, batch_size=3)
    batch = collate(examples)
    losses, right = objectives.losses(loaded.model, batch)
    assert metrics["accuracy"] == pytest.approx(right.float().mean().item())
    assert metrics["loss"] == pytest.approx(losses.mean().item(), abs=1e-4)
    from collections import Counter

    assert evaluation._macro_f1(Counter({(0, 0): 3, (1, 0): 1, (1, 1): 2})) == pytest.approx((6 / 7 + 4 / 5) / 2)


@pytest.mark.parametrize(
    ("prediction", "answers", "scores"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], (1.0, 1.0)),
        ("Broncos", ["Denver Broncos"], (0.0, 2 / 3)),
        ("nobody", ["Denver Broncos"], (0.0, 0.0)),
        ("in 1990", ["1989", "1990"], (0.0, 2 / 3)),
    ],
)
def test_answer_scores_are_squads(prediction, answers, scores):
    assert evaluation.answer_scores(prediction, answers) == pytest.approx(scores)


def test_questions_are_evaluated_by_generating(loaded):
    examples = [tokenize(Example("Q: x\nA:", ("th\n",), 0, ("th",)), loaded.tokenizer, context=128)]
    metrics = evaluation.evaluate(loaded.model, examples, loaded.tokenizer)
    assert set(metrics) == {"loss", "accuracy", "f1"}
