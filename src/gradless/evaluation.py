"""Metrics of a model on examples: loss, accuracy, F1, and SQuAD's metrics of generated answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch

from gradless.independence import independence
from gradless.objectives import TokenizedExample, collate, example_loss, scores
from gradless.types import LanguageModel, Tokenizer

Metrics = dict[str, float]
"""Metrics by name."""
MAX_ANSWER_TOKENS = 50
"""Largest number of tokens in a generated answer."""


def batches(examples: Sequence[TokenizedExample], size: int) -> Iterator[list[TokenizedExample]]:
    """Batches of examples of similar length, for evaluation."""
    ordered = sorted(examples, key=len)
    for start in range(0, len(ordered), size):
        yield list(ordered[start : start + size])


@torch.inference_mode()
def evaluate(
    model: LanguageModel,
    examples: Sequence[TokenizedExample],
    tokenizer: Tokenizer | None,
    *,
    batch_size: int = 32,
    generating: bool = True,
    progress: Callable[[int], object] | None = None,
    scored: Callable[[torch.Tensor, int], object] | None = None,
) -> Metrics:
    """Loss and accuracy over examples.

    Args:
        model: the language model.
        examples: at least one example.
        tokenizer: the model's tokenizer; answers are generated with it.
        batch_size: examples in a forward.
        generating: whether to generate answers to questions; otherwise only their loss is measured.
        progress: called after each batch with its number of examples.
        scored: called with each example's scores, fp32 (candidates,), and the index of the right one.

    Returns:
        `loss`; `accuracy` and macro `f1` if there are candidates to choose from. For questions with answers `accuracy` is
        exact match and `f1` is SQuAD's, over at most 50 greedily generated tokens up to a newline.
    """
    total, right, confusion, rows = 0.0, 0, Counter[tuple[int, int]](), independence(model).rows
    for batch in batches(examples, batch_size):
        made = collate(batch, rows=rows)
        for score, label in zip(scores(model, made), made.labels, strict=True):
            total += float(example_loss(score, label))
            if scored is not None:
                scored(score, int(label))
            guess = int(score.argmax())
            right += guess == int(label)
            confusion[guess, int(label)] += 1
        if progress is not None:
            progress(len(batch))
    metrics = {"loss": total / len(examples)}
    if examples[0].answers is not None and not generating:
        return metrics
    if examples[0].answers is not None:
        assert tokenizer is not None, "answers are generated with a tokenizer"
        each = [answer_scores(generate(model, e, tokenizer), e.answers or ()) for e in examples]
        exact, f1 = (sum(column) / len(each) for column in zip(*each, strict=True))
        return {**metrics, "accuracy": exact, "f1": f1}
    if any(len(example.completions) > 1 for example in examples):
        metrics |= {"accuracy": right / len(examples), "f1": _macro_f1(confusion)}
    return metrics


def generate(model: LanguageModel, example: TokenizedExample, tokenizer: Tokenizer) -> str:
    """The model's answer: greedy decoding up to a newline."""
    ids = torch.tensor([example.prompts[0]], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_ANSWER_TOKENS,
        do_sample=False,
        stop_strings=["\n"],
        tokenizer=tokenizer,
        pad_token_id=_pad(tokenizer),
    )
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip().split("\n")[0]


def answer_scores(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """SQuAD's exact match and F1 of a predicted answer, each the best over the accepted answers."""
    predicted = _normalized(prediction)
    exact = f1 = 0.0
    for answer in map(_normalized, answers):
        exact = max(exact, float(predicted == answer))
        common = sum((Counter(predicted) & Counter(answer)).values())
        f1 = max(f1, 2 * common / (len(predicted) + len(answer)) if common else 0.0)
    return exact, f1


def _normalized(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _macro_f1(confusion: Counter[tuple[int, int]]) -> float:
    """The unweighted mean of 2 TP / (2 TP + FP + FN) over the labels that occur."""
    labels = {label for _, label in confusion}
    f1 = []
    for label in labels:
        hits = confusion[label, label]
        misses = sum(n for (guess, truth), n in confusion.items() if (guess == label) != (truth == label))
        f1.append(2 * hits / (2 * hits + misses))
    return sum(f1) / len(f1)


def _pad(tokenizer: Tokenizer) -> int:
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
