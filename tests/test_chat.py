"""Conversations: which characters, and which tokens, are learned under chat templates of many kinds."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from gradless import objectives
from gradless.errors import GradlessError
from gradless.formats.gguf_model import load_gguf
from gradless.objectives import TokenizedExample, collate, tokenize
from gradless.tasks.chat import chat
from gradless.tasks.prompts import choose_task
from tests import chat_templates
from tests.tiny import MERGES, VOCABULARY


def tokenizer_with(template):
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    bytelevel = Tokenizer(models.BPE(vocabulary, [tuple(merge.split()) for merge in MERGES]))
    bytelevel.pre_tokenizer, bytelevel.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytelevel, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def kind(name):
    return tokenizer_with(getattr(chat_templates, name))


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def learned(example):
    """The texts of an example that are learned, one after the other."""
    text, edges = example.candidates[0], [0, *(edge for gap in example.gaps for edge in gap), len(example.candidates[0])]
    return [text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]


def texts(name, row, train_on="all"):
    (example,) = chat(kind(name), train_on)(row)
    return learned(example)


TALK = [user("hi"), assistant("Hello."), user("bye"), assistant("Ciao.")]
SYSTEM = {"role": "system", "content": "Be brief."}
REASONED = [user("hi"), assistant("<think>\nr1\n</think>\n\nHello."), user("bye"), assistant("<think>\nr2\n</think>\n\nCiao.")]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}]
ASKED = [user("Rain?"), assistant(None, tool_calls=[CALL]), {"role": "tool", "tool_call_id": "c1", "content": 'a "1"'}]
CALLED = [*ASKED, assistant("No.")]


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("CHATML", ["Hello.<|im_end|>\n", "Ciao.<|im_end|>\n"]),
        ("LLAMA2", [" Hello. </s>", " Ciao. </s>"]),
        ("LLAMA3", ["Hello.<|eot_id|>", "Ciao.<|eot_id|>"]),
        ("LLAMA31_TOOLS", ["Hello.<|eot_id|>", "Ciao.<|eot_id|>"]),
        ("MISTRAL", [" Hello.</s>", " Ciao.</s>"]),
        ("GEMMA", ["Hello.<end_of_turn>\n", "Ciao.<end_of_turn>\n"]),
        ("ZEPHYR", ["\nHello.</s>\n", "\nCiao.</s>\n"]),
        ("PHI3", ["Hello.<|end|>\n", "Ciao.<|end|>\n</s>"]),
        ("R1", ["Hello.<|end_of_sentence|>", "Ciao.<|end_of_sentence|>"]),
        ("QWEN3", ["Hello.<|im_end|>\n", "<think>\n\n</think>\n\nCiao.<|im_end|>\n"]),
        ("QWQ", ["Hello.<|im_end|>\n", "Ciao.<|im_end|>\n"]),
        ("GENERATION", ["Hello.<|im_end|>", "Ciao.<|im_end|>"]),
        ("PLAIN", ["Hello.", "Ciao.</s>"]),
        ("PARTS", ["Hello.<end_of_utterance>\n", "Ciao.<end_of_utterance>\n"]),
    ],
)
def test_each_turn_is_learned_from_the_prompts_end_to_the_token_that_ends_it(name, turns):
    assert texts(name, {"messages": TALK}) == turns
    assert texts(name, {"messages": TALK}, "last") == turns[-1:]
    (example,) = chat(kind(name))({"messages": TALK})
    whole = example.prompt + example.candidates[0]
    assert "hi" in example.prompt
    assert not any("bye" in turn for turn in turns)
    assert example.remarks == ()
    (alone,) = chat(kind(name))({"messages": TALK[:2]})
    assert alone.gaps == ()
    assert whole.startswith(alone.prompt)


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("CHATML", ["<think>\nr1\n</think>\n\nHello.<|im_end|>\n", "<think>\nr2\n</think>\n\nCiao.<|im_end|>\n"]),
        ("QWEN3", ["Hello.<|im_end|>\n", "<think>\nr2\n</think>\n\nCiao.<|im_end|>\n"]),
        ("QWQ", ["Hello.<|im_end|>\n", "r2\n</think>\n\nCiao.<|im_end|>\n"]),
        ("R1", ["\n\nHello.<|end_of_sentence|>", "\n\nCiao.<|end_of_sentence|>"]),
    ],
)
def test_reasoning_that_a_template_drops_is_not_learned_and_that_is_said(name, turns):
    assert texts(name, {"messages": REASONED}) == turns
    (example,) = chat(kind(name))({"messages": REASONED})
    assert bool(example.remarks) == (name != "CHATML")
    assert all("reasoning" in remark for remark in example.remarks)


def test_reasoning_in_a_key_of_its_own():
    row = {"messages": [user("hi"), assistant("Hello.", reasoning_content="r1")]}
    assert texts("QWEN3", row) == ["<think>\nr1\n</think>\n\nHello.<|im_end|>\n"]
    (example,) = chat(kind("CHATML"))(row)
    assert "reasoning" in example.remarks[0]


def test_names_that_a_template_does_not_write_are_said():
    (example,) = chat(kind("CHATML"))({"messages": [user("hi") | {"name": "Ann"}, assistant("Hello.")]})
    assert example.remarks == ("the chat template does not write its messages' names",)


def test_a_generation_prompt_that_closes_the_reasoning_is_not_learned():
    row = {"messages": TALK, "chat_template_kwargs": {"enable_thinking": False}}
    assert texts("QWEN3", row) == ["Hello.<|im_end|>\n", "Ciao.<|im_end|>\n"]
    with pytest.raises(GradlessError, match="'enable_thinking', which the model's chat template does not read"):
        texts("CHATML", row)
    with pytest.raises(GradlessError, match="'tools', which is not the data's to decide"):
        texts("QWEN3", {"messages": TALK, "chat_template_kwargs": {"tools": []}})


@pytest.mark.parametrize("name", ["GEMMA", "MISTRAL"])
def test_a_system_message_that_the_template_does_not_take(name):
    with pytest.raises(GradlessError, match=r"System role not supported|does not write message 1, of role 'system'"):
        texts(name, {"messages": [SYSTEM, *TALK]})
    (example,) = chat(kind("MISTRAL_SYSTEM_FIRST"))({"messages": [SYSTEM, *TALK]})
    assert example.prompt == "<s>[INST] Be brief.\n\nhi[/INST]"


def test_what_a_message_says_is_found_although_it_looks_like_the_templates_own_text():
    sly = user("Say <|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n")
    assert texts("CHATML", {"messages": [sly, assistant("Yes."), *TALK]})[0] == "Yes.<|im_end|>\n"
    assert (
        texts("R1", {"messages": [user("<|Assistant|><think>\nNo."), assistant("Yes."), *TALK]})[0] == "Yes.<|end_of_sentence|>"
    )


def test_turns_side_by_side_and_a_conversation_that_the_assistant_begins():
    row = {"messages": [user("hi"), assistant("One."), assistant("Two.")]}
    assert texts("CHATML", row) == ["One.<|im_end|>\n", "Two.<|im_end|>\n"]
    with pytest.raises(GradlessError, match="roles must alternate"):
        texts("LLAMA2", row)
    row = {"messages": [assistant("Welcome."), *TALK]}
    assert texts("R1", row) == ["Welcome.<|end_of_sentence|>", "Hello.<|end_of_sentence|>", "Ciao.<|end_of_sentence|>"]


# -- tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("LLAMA31_TOOLS", ['{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>', "No.<|eot_id|>"]),
        (
            "QWEN3",
            [
                '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n',
                "<think>\n\n</think>\n\nNo.<|im_end|>\n",
            ],
        ),
    ],
)
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_calls_are_learned_and_tools_are_in_the_prompt(name, turns, tools):
    row = {"messages": CALLED, "tools": tools}
    assert texts(name, row) == turns
    (example,) = chat(kind(name))(row)
    assert '"description": "d"' in example.prompt
    flat = {**CALL["function"], "arguments": {"city": "Rome"}}
    assert texts(name, {"messages": [user("Rain?"), assistant("", tool_calls=[flat]), *CALLED[2:]]}) == turns


def test_a_template_that_joins_arguments_to_text_gets_them_as_text():
    call = '<|tool_call|>weather\n```json\n{"city": "Rome"}\n```<|end_of_sentence|>'
    assert texts("R1", {"messages": CALLED}) == [call, "No.<|end_of_sentence|>"]


def test_a_tools_answer_within_the_turn_is_not_learned():
    turns = ['<call>weather{"city": "Rome"}<response>', "No.<end>\n", "Ciao.<end>\n"]
    assert texts("TOOLS_INSIDE", {"messages": [*CALLED, *TALK[2:]]}) == turns


def test_a_turn_on_whose_call_the_next_message_depends_is_refused_if_its_end_is_not_certain():
    """Its last message has another end than the others, and an answer is written after a call only."""
    template = chat_templates.TOOLS_INSIDE + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    with pytest.raises(GradlessError, match="does not show where message 2, the assistant's, begins and ends"):
        chat(tokenizer_with(template))({"messages": CALLED})
    (example,) = chat(tokenizer_with(template), "last")({"messages": CALLED})
    assert learned(example) == ["No.<end>\n</s>"]


def test_the_template_for_tools_is_taken_where_a_model_has_one():
    tokenizer = kind("CHATML")
    tokenizer.chat_template = {"default": chat_templates.CHATML, "tool_use": chat_templates.QWEN3}
    (example,) = chat(tokenizer)({"messages": CALLED, "tools": TOOLS})
    assert "# Tools" in example.prompt
    (example,) = chat(tokenizer)({"messages": TALK})
    assert "You are a helpful assistant." in example.prompt
    tokenizer.chat_template = {"a": chat_templates.CHATML, "b": chat_templates.QWEN3}
    with pytest.raises(GradlessError, match="cannot choose a chat template"):
        chat(tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": TALK, "tools": TOOLS}, "does not write the row's tools"),
        ({"messages": CALLED}, "does not write message 2, of role 'assistant'"),
        ({"messages": TALK, "tools": "[{"}, "column 'tools' is not JSON"),
        ({"messages": TALK, "tools": {"name": "f"}}, "column 'tools' is an object; it must be a list"),
        ({"messages": TALK, "tools": [{"function": {}}]}, "column 'tools', entry 1 has no 'name'"),
        ({"messages": [user("hi"), assistant(None, tool_calls=["weather"])]}, "'tool_calls', entry 1 is the text 'weather'"),
        ({"messages": [user("hi"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": "{"}}])]}, "not JSON"),
        ({"messages": [user("hi"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": 1}}])]}, "a number"),
        ({"messages": [user("hi") | {"tool_calls": [CALL]}, assistant("Yes.")]}, "only the assistant's messages can have"),
        ({"messages": [user("hi"), assistant("", function_call={"name": "f"})]}, "'function_call': it is OpenAI's older form"),
        ({"messages": TALK, "functions": [{}]}, "column 'functions' is OpenAI's older form"),
    ],
)
def test_tools_that_cannot_be_learned(row, message):
    task = choose_task("chat", None, None, row, kind("CHATML"))
    with pytest.raises(GradlessError, match=rf"^d\.jsonl, row 1: .*{message}"):
        task.examples([row], "d.jsonl")


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_weights_decide_which_turns_are_learned():
    weighted = [user("hi"), assistant("Hello.", weight=0), user("bye"), assistant("Ciao.", weight=1)]
    assert texts("CHATML", {"messages": weighted}) == ["Ciao.<|im_end|>\n"]
    assert texts("GENERATION", {"messages": weighted}) == ["Ciao.<|im_end|>"]
    weighted[1]["weight"], weighted[3]["weight"] = 1, 0
    assert texts("CHATML", {"messages": weighted}) == ["Hello.<|im_end|>\n"]
    with pytest.raises(GradlessError, match="none of its messages is learned"):
        texts("CHATML", {"messages": weighted}, "last")
    for weight in (0.5, -1, True, "1"):
        with pytest.raises(GradlessError, match=r"'weight' is .*; it must be 0 or 1"):
            texts("CHATML", {"messages": [user("hi"), assistant("Hello.", weight=weight)]})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("hi"), assistant([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}])]},
        {"messages": json.dumps([user("hi"), assistant("Hello.")])},
        {"prompt": [user("hi")], "completion": [assistant("Hello.")]},
        {"prompt": [user("hi")], "completion": "Hello."},
        {"prompt": [user("hi"), assistant("One."), user("more")], "completion": [assistant("Hello.")]},
        {"messages": [user("hi"), assistant("Hello.")], "prompt": None, "completion": None, "tools": None},
    ],
)
def test_shapes_of_one_answer(row):
    assert texts("CHATML", row) == ["Hello.<|im_end|>\n"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": None}, "column 'messages' is null"),
        ({"messages": []}, "is an empty list"),
        ({"messages": "hi"}, "column 'messages' is not JSON"),
        ({"messages": "  "}, "is a blank text; it must be a list"),
        ({"messages": "{}"}, "is an object; it must be a list"),
        ({"messages": {"role": "user"}}, "is an object; it must be a list"),
        ({"messages": ["hi"]}, "entry 1 is the text 'hi'; it must be an object with 'role'"),
        ({"messages": [{"content": "hi"}]}, "entry 1 has no 'role'"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "entry 1 has no 'role'"),
        ({"messages": [{"role": None, "content": "hi"}]}, "'role' is null"),
        ({"messages": [{"role": "user"}, assistant("Hello.")]}, "message 1, of role 'user', has no content"),
        ({"messages": [user(None), assistant("Hello.")]}, "message 1, of role 'user', has no content"),
        ({"messages": [user(5), assistant("Hello.")]}, "'content' is a number; it must be a text, or a list of parts"),
        ({"messages": [user("hi"), assistant(None)]}, "message 2, of role 'assistant', has no content"),
        ({"messages": [user("hi"), assistant(" ")]}, "message 2, the assistant's, has no content to learn"),
        ({"messages": [user("hi"), assistant(None, refusal="I won't.")]}, "'refusal': no chat template writes it"),
        ({"messages": [user([{"type": "image_url", "image_url": {}}]), assistant("A cat.")]}, "a part of type 'image_url'"),
        ({"messages": [user([{"text": "hi"}]), assistant("Hello.")]}, "a part of its content has no 'type'"),
        ({"messages": [user([{"type": "text"}]), assistant("Hello.")]}, "a part of its content has no 'text'"),
        (
            {"messages": [{"role": "narrator", "content": "x"}, assistant("Hello.")]},
            "has the role 'narrator'; there are system",
        ),
        ({"messages": [user("hi")]}, "its last message is of role 'user'"),
        ({"messages": [*TALK, user("hi")]}, "its last message is of role 'user'"),
        ({"messages": [SYSTEM]}, "its last message is of role 'system'"),
        ({"messages": ASKED}, "its last message is of role 'tool'"),
        ({"messages": TALK, "completion": "Hello."}, " has both messages and a completion"),
        ({"prompt": "hi", "completion": [assistant("Hello.")]}, "column 'prompt' is the text 'hi'; it must be a list"),
        ({"prompt": [user("hi")], "completion": [user("hi"), assistant("x")]}, "'completion' holds a message of role 'user'"),
        ({"prompt": [user("hi")]}, "has no messages, nor both prompt and completion"),
        ({"messages": TALK, "images": ["a.png"]}, "column 'images' is not read; only text is learned"),
        ({"messages": TALK, "system": "Be brief."}, "column 'system' is not read; write it into a message"),
        ({"messages": TALK, "weight": 2}, "column 'weight' is not read"),
        ({"messages": TALK, "label": False}, "column 'label' does not change what is learned"),
        ({"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, "'chosen' is preference data"),
    ],
)
def test_conversations_that_cannot_be_learned(row, message):
    for name in ("chat", None):
        task = choose_task(name, None, None, row, kind("CHATML"))
        with pytest.raises(GradlessError, match=rf"^d\.jsonl, row 1.*{message}"):
            task.examples([row], "d.jsonl")


def test_rows_of_several_shapes_are_each_read_as_what_they_are():
    rows = [
        {"messages": TALK[:2], "prompt": None},
        {"prompt": "One, two,", "completion": " three"},
        {"prompt": [user("hi")], "completion": [assistant("Hey.")], "messages": None},
    ]
    task = choose_task(None, None, None, rows[0], kind("CHATML"))
    assert [learned(example) for example in task.examples(rows)] == [["Hello.<|im_end|>\n"], [" three"], ["Hey.<|im_end|>\n"]]
    with pytest.raises(GradlessError, match=r"row 2 has no column 'prompt', which task completion needs; it has text\."):
        task.examples([rows[0], {"text": "x"}])


def test_a_template_that_fails():
    for template in ("{{ messages[9].content.foo }}", "{{ 1 / 0 }}", "{% for x in %}", "{{ raise_exception('no\nway') }}"):
        with pytest.raises(GradlessError, match="its messages do not fit the model's chat template: "):
            chat(tokenizer_with(template))({"messages": TALK})
    with pytest.raises(GradlessError, match="does not write message 1, of role 'user'"):
        chat(tokenizer_with("fixed"))({"messages": TALK})
    twice = "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].content }}"
    with pytest.raises(GradlessError, match="does not show where message 4, the assistant's, begins and ends"):
        chat(tokenizer_with(twice))({"messages": TALK})


WORDS = st.sampled_from(["role", "content", "type", "text", "tool_calls", "function", "name", "user", "assistant"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(st.sampled_from(["messages", "prompt", "completion", "tools", "label", "x"]), JSON, max_size=3) | JSON,
    st.sampled_from([None, "chat", "completion", "sst2", "wsc", "copa", "multirc", "squad", "boolq"]),
    st.sampled_from(["CHATML", "QWEN3", "R1"]),
)
def test_any_row_gives_examples_or_a_sentence(row, name, template):
    try:
        first = row if isinstance(row, dict) else {"messages": row}
        examples = choose_task(name, None, None, first, kind(template)).examples([row])
    except GradlessError:
        return
    assert all(example.candidates[0].strip() for example in examples)


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tiny):
    return load_gguf(tiny, dtype=torch.float32)


def learned_tokens(made):
    """(what stands before, the token) of every token that is learned."""
    return [(made.prompts[0] + made.completions[0][:i], made.completions[0][i]) for i in made.learned(made.completions[0])]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ["CHATML", "LLAMA2", "R1", "PLAIN"])
def test_the_tokens_that_are_learned_are_those_of_the_texts(name, fast):
    tokenizer = kind(name)
    (example,) = chat(tokenizer)({"messages": [user("h é 日"), assistant("the 日本  "), user("  the"), assistant("th\n\nx")]})
    if not fast:
        tokenizer = type("Slow", (), {"is_fast": False, "__getattr__": lambda _, n: getattr(inner, n)})()
        inner = kind(name)
        type(tokenizer).__call__ = lambda _, text, **more: inner(text, **more)
    made = tokenize(example, tokenizer, context=10_000)
    ids = [token for _, token in learned_tokens(made)]
    assert kind(name).decode(ids) == "".join(learned(example))
    whole = kind(name)(example.prompt + example.candidates[0], add_special_tokens=False).input_ids
    assert [*made.prompts[0], *made.completions[0]] == whole


@torch.inference_mode()
def test_the_loss_of_a_row_is_the_mean_over_all_its_learned_tokens(loaded):
    examples = [
        TokenizedExample(((5, 6),), ((7, 8, 9, 10, 11),), 0, gaps=((1, 3),)),
        TokenizedExample(((5, 6, 3),), ((7, 8),), 0),
    ]
    losses, _ = objectives.losses(loaded.model, collate(examples))
    for example, loss in zip(examples, losses, strict=True):
        prompt, completion = example.prompts[0], example.completions[0]
        logprobs = F.log_softmax(loaded.model(torch.tensor([[*prompt, *completion]])).logits[0], dim=-1)
        each = [-logprobs[len(prompt) + i - 1, completion[i]] for i in example.learned(completion)]
        assert loss.item() == pytest.approx(torch.stack(each).mean().item(), abs=1e-4)
    assert collate(examples).counts == [3, 2]
    assert objectives_loss(loaded, examples) == pytest.approx(losses.mean().item(), abs=1e-4)


def objectives_loss(loaded, examples):
    from gradless.evaluation import evaluate

    return evaluate(loaded.model, examples, loaded.tokenizer)["loss"]


def test_of_a_conversation_that_is_too_long_the_end_is_kept():
    tokenizer = kind("CHATML")
    (example,) = chat(tokenizer)({"messages": [user("a"), assistant("bcd"), user("e"), assistant("fg")]})
    whole = tokenize(example, tokenizer, context=1000)
    everything = learned_tokens(whole)
    ids = [*whole.prompts[0], *whole.completions[0]]
    for limit in range(3, len(ids) + 1):
        made = tokenize(example, tokenizer, context=1000, max_length=limit)
        assert [*made.prompts[0], *made.completions[0]] == ids[-limit:]
        kept = learned_tokens(made)
        assert [token for _, token in kept] == [token for _, token in everything[len(everything) - len(kept) :]]
        assert all(len(before) > 0 for before, _ in kept)
        assert made.shortened == (len(kept) < len(everything))
    with pytest.raises(GradlessError, match="a limit of 2 tokens leaves no room"):
        tokenize(example, tokenizer, context=1000, max_length=2)
    with pytest.raises(GradlessError, match="longer than the model's context of 20"):
        tokenize(example, tokenizer, context=20)


def test_what_a_journal_knows_its_data_by_is_as_it_was():
    old = TokenizedExample(((1, 2),), ((3,),), 0, ("a",), shortened=True)
    assert repr(old) == "TokenizedExample(prompts=((1, 2),), completions=((3,),), label=0, answers=('a',))"
    assert repr(TokenizedExample(((1,),), ((2, 3, 4),), 0, gaps=((1, 2),))).endswith("answers=None, gaps=((1, 2),))")
