"""Tokens of GGUF files: llama.cpp's, for every rule of words, from the file alone."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gradless.errors import GradlessError
from gradless.formats.gguf_tokenizer import SPACE, WORDS, bytes_to_text, load_tokenizer
from gradless.objectives import Example, tokenize
from tests.llama_tokens import llama_tokens
from tests.tiny import tiny_gguf

TEXTS = [
    *("", " ", "  ", "\n", "\n\n", "\n\n\n  \n", "a\n", "\ta\tb\t", "\r\n\r\n x", "   leading", "trailing   "),
    *(
        "Hello world, it's THE don't WE'LL they're I'M you'd 've 'S x'Re",
        "'quoted 'sword' 'T' ''s ''",
        "it'S DON'T 'swim 'swift",
    ),
    "1 12 123 1234 12345 123456 1234567 3.14159 2024-11-28 ½ Ⅷ ²³ ١٢٣٤٥ 12²345 007abc 1a2b",
    "a\n\n\n 7\t\t8  9\n\n b 10  c\td \t\t1234 \t\t6a",
    "你好世界，这是一个测试。漢字かな交じり文 カタカナ ｶﾀｶﾅ 한국어 텍스트 ㄱㄴ ㄅㄆ 𠀀 㐀 々〆〇 ・ー〜",
    "مرحبا بالعالم ١٢٣، كيف حالك؟ שלום עולם สวัสดีชาวโลก ๑๒๓ ລາວ ខ្មែរ မြန်မာ हिन्दी में पाठ বাংলা",
    "😀👍🏽👩‍👩‍👧 🇩🇪 ❤️ ★☆ ∑∫ €$£ → «quoted» “smart” ‘single’ — … ¿¡ !!!???...,,,;;;///\\\\(((]]]",
    "def f(x):\n\tif x==1:\n\t\treturn {'a':[1,2]}\n    # c\n\n\n\nclass A: pass\r\nf_b != Baz && i++ // x->y <T> ~a `b` |c|^d",
    "x;\n\n\ny ;\n z//\n/ a/b\n/c\n\n/d /\n e/ price: $1,234.56 (50% off!) https://a.b/c?d=e&f=g#h",
    "  a  b   c    d     e\t\tf \n g\n\n\nh \n\n i\u00a0j\u3000k\u2003 l\u0085m\u200bn x\u2028y\u2029z \u2028 \u2028\u2028w",
    "NFC é ü Å NFD e\u0301 u\u0308 A\u030a ẛ̣ ﬁ İ ı ß Ǆ ǅ ʰ ª µ K Ω ab\u0301 c\u0301\u0301d \u0301 !\u0301 ᾼιι ᲀ Ა ꭰ 𐐀 𞤀",
    "CamelCaseWordsAND ACRONYMs iPhone McDonald's XMLHttpRequest éÉéÉ АБВгд A\u200cB\u200dC \x0b\x0c\x01\x7f",
    "<|end|> a<|end|>b <|im_start|>user\nhi<|im_end|>\n<unk>x [tool] a[tool]b",
    "<sentinel:12> IMGIMGABCDZ IMGIMGAZ",
    "a xyzzyq Catx xyzzyq",
]
UNMERGED = ["xyzzyq", "ĠCatx", "Ġxyzzyq"]
"""Tokens that no merge makes: only a rule that leaves words whole finds them."""
ADDED = {"<|end|>": 3, "<|im_start|>": 3, "<|im_end|>": 1, "<unk>": 2, "[tool]": 4}
"""Token -> type; llama.cpp takes <|im_end|> for a control token by its text."""
SAID = [{"role": "user", "content": "hello"}]
SMALL = {"block_count": 1, "embedding_length": 64, "attention.head_count": 1, "attention.head_count_kv": 1}


@cache
def learned() -> tuple[list[str], list[str]]:
    """A vocabulary of bytes and merges of them, learned from every piece of a few characters of the texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    texts = [text for text in TEXTS if "<|" not in text and "xyzzy" not in text]
    pieces = [text[i : i + k] for text in texts for k in (2, 3, 4, 6) for i in range(len(text))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(pieces, trainers.BpeTrainer(vocab_size=5000, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(made.to_str())["model"]
    return [*model["vocab"], *UNMERGED], [" ".join(pair) for pair in model["merges"]]


def bpe(path: Path, pre: str | None, **more: Any) -> Path:
    tokens, merges = learned()
    n = len(tokens)
    stated = {
        "tokenizer.ggml.tokens": [*tokens, *ADDED],
        "tokenizer.ggml.token_type": [1] * n + [*ADDED.values()],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.bos_token_id": n,
        "tokenizer.ggml.eos_token_id": n + 1,
        "tokenizer.ggml.padding_token_id": n,
        "tokenizer.ggml.unknown_token_id": n + 3,
        "tokenizer.ggml.add_bos_token": None,
    }
    changed = {f"tokenizer.{key}": value for key, value in more.items()}
    return tiny_gguf(path, metadata={**SMALL, **stated, **changed})


def sentencepiece(path: Path, **more: Any) -> Path:
    """Pieces of all bytes, some letters and what they make, each with a score of its own, longer ones not always lower."""
    words = [
        "the",
        "ing",
        "hello",
        "aa",
        "aaa",
        "aaaa",
        "==",
        "===",
        f"{SPACE}a",
        f"{SPACE}the",
        SPACE * 2,
        SPACE * 3,
        SPACE * 4,
    ]
    parts = {word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, len(word) + 1)}
    letters = sorted({SPACE, *"abcdefghijklmnopqrst.,!=é漢"} | {part for part in parts if len(part) == 1})
    longer = sorted(parts - set(letters))
    random.Random(0).shuffle(longer)
    head = ["<unk>", "<s>", "</s>", "[INST]", "\n\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, 3, 4, *([6] * 256), *([1] * len(longer + letters))]
    scores = [*([0.0] * len(head)), *(-1.0 - i for i in range(len(longer + letters)))]
    stated = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*head, *longer, *letters],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.merges": None,
        **dict.fromkeys((f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding", "unknown")), None),
        "tokenizer.ggml.add_bos_token": None,
    }
    changed = {f"tokenizer.{key}": value for key, value in more.items()}
    return tiny_gguf(path, metadata={**SMALL, **stated, **changed})


def differing(path: Path, texts: list[str]) -> list[str]:
    tokenizer, theirs = load_tokenizer(path), llama_tokens(path, texts)
    assert theirs is not None, f"llama.cpp refuses {path}"
    return [text for text, ids in zip(texts, theirs, strict=True) if tokenizer(text).input_ids != ids]


def names(every: bool) -> list[str]:
    """All rules' names, or one of each rule."""
    return (
        [*WORDS] if every else [next(name for name in WORDS if WORDS[name] == rule) for rule in dict.fromkeys(WORDS.values())]
    )


def test_each_rule_of_words_gives_llama_cpps_tokens(tmp_path):
    assert {name: bad for name in names(False) if (bad := differing(bpe(tmp_path / "one.gguf", name), TEXTS))} == {}


@pytest.mark.slow
def test_each_name_of_a_rule_gives_llama_cpps_tokens_of_random_texts(tmp_path):
    draw = random.Random(0)
    alphabet = sorted(set("".join(TEXTS)))

    def text() -> str:
        either = (alphabet, " \n\r\t\t1234aA'.sd/")
        return "".join(draw.choice(draw.choice(either)) for _ in range(draw.randint(1, 40)))

    texts = [*TEXTS, *(text() for _ in range(500))]
    assert {name: bad for name in names(True) if (bad := differing(bpe(tmp_path / "one.gguf", name), texts))} == {}


def test_a_file_without_a_name_has_the_default_rule(tmp_path):
    assert differing(bpe(tmp_path / "none.gguf", None), TEXTS) == []


@pytest.mark.parametrize("pre", ["gemma4", "whitespace", "sarvam-moe", "qwen99"])
def test_other_names_are_refused(tmp_path, pre):
    with pytest.raises(GradlessError, match=f"'{pre}'; supported are default, llama3"):
        load_tokenizer(bpe(tmp_path / "one.gguf", pre))


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", "plamo2", "gemma4", "none"])
def test_other_vocabularies_are_refused(tmp_path, kind):
    with pytest.raises(GradlessError, match=f"'{kind}'; gpt2 and llama are supported"):
        load_tokenizer(bpe(tmp_path / "one.gguf", "gpt-2", **{"ggml.model": kind}))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"ggml.add_bos_token": True},
        {"ggml.add_bos_token": True, "ggml.add_eos_token": True},
        {"ggml.add_eos_token": True, "ggml.add_space_prefix": True, "ggml.add_sep_token": False},
        {"ggml.bos_token_id": 10**6, "ggml.padding_token_id": 10**6},
    ],
)
def test_what_is_added_around_a_text_is_llama_cpps(tmp_path, more):
    assert differing(bpe(tmp_path / "one.gguf", "qwen2", **more), TEXTS) == []


def test_a_byte_that_is_no_token_is_dropped(tmp_path):
    tokens, merges = learned()
    lost = bytes_to_text()[ord("~")]
    kept = [token for token in tokens if lost not in token]
    changed = {
        "ggml.tokens": [*kept, *ADDED],
        "ggml.token_type": [1] * len(kept) + [*ADDED.values()],
        "ggml.merges": [merge for merge in merges if lost not in merge],
        **{f"ggml.{name}_token_id": len(kept) for name in ("bos", "eos", "padding", "unknown")},
    }
    assert differing(bpe(tmp_path / "one.gguf", "gpt-2", **changed), [*TEXTS, "a~b ~~ a~"]) == []


@pytest.mark.parametrize(
    "more", [{}, {"ggml.add_space_prefix": False}, {"ggml.add_bos_token": False, "ggml.add_eos_token": True}]
)
def test_pieces_are_merged_by_their_scores(tmp_path, more):
    draw = random.Random(0)
    parts = [
        "the",
        "hello",
        "ing",
        " ",
        "  ",
        "a",
        "aa",
        "=",
        "==",
        "\n",
        "\n\n\n",
        "[INST]",
        "<s>",
        "é",
        "漢",
        "😀",
        SPACE,
        "<0x41>",
    ]
    texts = ["".join(draw.choice(parts) for _ in range(draw.randint(1, 30))) for _ in range(300)]
    texts += [letter * n for letter in "a= \n" for n in range(1, 40)]
    assert differing(sentencepiece(tmp_path / "one.gguf", **more), [*TEXTS, *texts]) == []


def test_pieces_of_one_score_are_refused(tmp_path):
    path = sentencepiece(tmp_path / "one.gguf")
    count = len(load_tokenizer(path))
    with pytest.raises(GradlessError, match="have equal scores"):
        load_tokenizer(sentencepiece(path, **{"ggml.scores": [0.0] * count}))


def test_every_key_is_known_or_refused(tmp_path):
    with pytest.raises(GradlessError, match=r"the key tokenizer\.ggml\.add_prefix is unknown"):
        load_tokenizer(bpe(tmp_path / "one.gguf", "gpt-2", **{"ggml.add_prefix": True}))
    with pytest.raises(GradlessError, match=r"the key tokenizer\.rwkv\.world is unknown"):
        load_tokenizer(bpe(tmp_path / "one.gguf", "gpt-2", **{"rwkv.world": "x"}))


def test_chat_templates_keep_their_names(tmp_path):
    one = load_tokenizer(bpe(tmp_path / "one.gguf", "gpt-2", chat_template="{{ bos_token }}one"))
    assert one.apply_chat_template(SAID, tokenize=False) == "<|end|>one"
    two = {"chat_template": "one", "chat_template.tool_use": "two", "chat_templates": ["tool_use"]}
    tokenizer = load_tokenizer(bpe(tmp_path / "two.gguf", "gpt-2", **two))
    assert tokenizer.apply_chat_template(SAID, tokenize=False) == "one"
    assert tokenizer.apply_chat_template(SAID, tokenize=False, chat_template="tool_use") == "two"


def test_files_beside_a_gguf_change_nothing(tmp_path):
    path = bpe(tmp_path / "one.gguf", "qwen2", chat_template="mine")
    before = [load_tokenizer(path)(text).input_ids for text in TEXTS]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "th", "chat_template": "theirs"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("theirs")
    after = load_tokenizer(path)
    assert [after(text).input_ids for text in TEXTS] == before
    assert after.chat_template == "mine"


@pytest.mark.parametrize("kind", [bpe, sentencepiece])
def test_a_saved_tokenizer_gives_the_same_tokens(tmp_path, kind):
    from transformers import AutoTokenizer

    path = bpe(tmp_path / "one.gguf", "deepseek-v3") if kind is bpe else sentencepiece(tmp_path / "one.gguf")
    tokenizer = load_tokenizer(path)
    tokenizer.save_pretrained(tmp_path / "folder")
    again = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    assert tokenizer.decode(tokenizer("the hello  é\n", add_special_tokens=False).input_ids) == "the hello  é\n"


@pytest.mark.parametrize("before", ["", "\n", "  ", "\n\n \t", "<|end|>"])
@pytest.mark.parametrize("adds", [True, False])
def test_a_sequence_begins_with_one_bos_however_its_text_begins(tmp_path, before, adds):
    more = {"ggml.add_bos_token": adds, "ggml.add_eos_token": adds}
    tokenizer = load_tokenizer(bpe(tmp_path / "one.gguf", "llama-bpe", **more))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    written = "" if before == "<|end|>" else "<|end|>"
    made = tokenize(Example(f"{before}{written}hello", ("x", "1234")), tokenizer, context=64)
    for prompt, completion in zip(made.prompts, made.completions, strict=True):
        assert prompt.count(bos) == 1
        assert eos not in (*prompt, *completion)
        assert tokenizer.decode([*prompt, *completion]).startswith(f"{before}{written}hello ")


def test_a_bos_that_the_tokenizer_adds_is_there_once(tmp_path):
    tokenizer = load_tokenizer(bpe(tmp_path / "one.gguf", "llama-bpe", **{"ggml.add_eos_token": True}))
    made = tokenize(Example("hello", ("x",)), tokenizer, context=64)
    assert made.prompts[0][0] == tokenizer.bos_token_id
    assert (*made.prompts[0], *made.completions[0]).count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in (*made.prompts[0], *made.completions[0])
