"""The tokenizer of a GGUF file, from its metadata alone. Files beside it are not read.

The tokens of a text are llama.cpp's, also if the text holds special tokens. Two kinds of vocabularies are read:

    gpt2     merges in the order of the file, over the bytes of words; `tokenizer.ggml.pre` names the rule that finds the words
    llama    SentencePiece: merges the neighbours whose piece has the highest score; other characters are spelled in bytes

Other kinds, rules that are not listed here and unknown keys under `tokenizer.` are refused. Characters that Unicode 16 added
(Garay, Todhri ...) are letters or symbols here, and unknown to llama.cpp.

Over 400 lines, because the rules that find words are read side by side.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gradless import types
from gradless.errors import GradlessError
from gradless.readers.gguf import read_header

PREFIX = "tokenizer.ggml."
SPACE = "▁"
"""The character for a space in SentencePiece's pieces."""
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""Types of tokens. 1 is an ordinary token; 5, an unused one, is read like it."""
_BYTES_OF_TEXT = [byte for byte in range(256) if byte < 0xF5 and byte not in (0xC0, 0xC1)]
"""Bytes that occur in UTF-8."""

CONTROL_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>"),
        *("<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[", "<|ifm|im_end|>", "<|plamo:eos|>"),
        *(
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<｜fim▁begin｜>",
            "<PRE>",
            "▁<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ),
        *(
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<｜fim▁hole｜>",
            "<SUF>",
            "▁<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ),
        *(
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<｜fim▁end｜>",
            "<MID>",
            "▁<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ),
        *("<|plamo:fim_prefix|>", "<|plamo:fim_suffix|>", "<|plamo:fim_middle|>", "<|plamo:file_separator|>"),
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    )
)
"""Texts that are control tokens in llama.cpp, whatever their type in the file."""
USER_DEFINED_TEXTS = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))

SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
"""transformers' name of a special token -> the key of its id, without `tokenizer.ggml.`."""
READ = (
    *("model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token", "add_eos_token", "add_space_prefix"),
    *SPECIAL_IDS.values(),
)
CHAT_TEMPLATE, CHAT_TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"
NEUTRAL = (
    *("add_sep_token", "token_type_count"),  # for pairs of texts
    *("eot_token_id", "eom_token_id", "suppress_tokens"),  # for chats and samplers: ends of answers, suppressed tokens
    *("prefix_token_id", "suffix_token_id", "middle_token_id"),  # for editors
    *("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id"),
    *("remove_extra_whitespaces", "precompiled_charsmap"),  # for t5's vocabularies
    *("normalizer.lowercase", "normalizer.strip_accents"),  # for bert's
)
"""Keys under `tokenizer.ggml.` that change no token of the supported vocabularies."""

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GAPS = r"\s+(?!\S)|\s+"
_PUNCTUATION = r"[!-/:-@\[-`{-~]"
_ASIAN = r"[[\u0800-\u9fa5\uac00-\ud7ff]&&\S]+"
_CHINESE = "[\u4e00-\u9fa5\u3040-\u30ff]+"
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""The letters with a case in the rule of DeepSeek's first models."""
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ebef\U0002f800-\U0002fa1f"
_EAST = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0eff\u1780-\u17ff\u1000-\u109f"
    "\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)


def _words(
    digits: str = r"\p{N}{1,3}",
    letters: str = r"\p{L}+",
    others: str = r"\s\p{L}\p{N}",
    end: str = r"[\r\n]*",
    lines: str = r"\s*[\r\n]+",
    gaps: str = _GAPS,
    contractions: str = _CONTRACTIONS + "|",
) -> str:
    """Words of cl100k: letters with one sign before them, up to three digits, other signs with the end of their line."""
    return rf"{contractions}[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}| ?[^{others}]+{end}|{lines}|{gaps}"


def _cased_words(
    digits: str = r"\p{N}{1,3}",
    upper: str = r"[\p{L}&&[^a-z]]",
    lower: str = r"[\p{L}&&[^A-Z]]",
    contractions: str = _CONTRACTIONS + "?",
) -> str:
    """Words of o200k: letters also end before a capital that follows a small letter."""
    head = r"[^\r\n\p{L}\p{N}]?"
    either = rf"{head}{upper}*{lower}+{contractions}|{head}{upper}+{lower}*{contractions}"
    return rf"{either}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_GAPS}"


_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_GAPS}"
_SIGNED_WORDS = rf"{_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+"
_THOUSANDS = r"(?<=\p{N})(?=(?:\p{N}{3})*(?!\p{N}))"
"""Matches within a number before each three of its last digits, and after the number."""
_DEEPSEEK3 = (r"\p{N}{1,3}", _CHINESE, rf"{_SIGNED_WORDS}[\r\n]*|\s*[\r\n]+|{_GAPS}")
_ALL_LETTERS = {"upper": r"[\p{L}\p{M}]", "lower": r"[\p{L}\p{M}]"}
_MARKED = {"upper": r"[\p{L}\p{M}&&[^a-z]]", "lower": r"[\p{L}\p{M}&&[^A-Z]]"}
_NOT_STOPS = " ?[^(\\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class Words:
    """A rule that splits a text into words.

    Attributes:
        splits: regular expressions. Each cuts the pieces of the one before, at both ends of every match.
        whole: a word that is a token is not split (`ignore_merges`).
        begins: whether to add the beginning-of-sequence token if the file does not say.
    """

    splits: tuple[str, ...]
    whole: bool = False
    begins: bool = False


def _named(names: str, *splits: str, whole: bool = False, begins: bool = False) -> dict[str, Words]:
    return dict.fromkeys(names.split(), Words(splits, whole, begins))


WORDS: dict[str, Words] = {
    **_named("default", r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **_named("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2", _words(), whole=True, begins=True),
    **_named("jina-v5-nano", _words(), whole=True, begins=True),
    **_named("dbrx smaug-bpe chatglm-bpe", _words()),
    **_named("glm4 glm5", _words(), whole=True),
    **_named("jais-2", _words(gaps="|".join([*(rf"\s{{{2**n}}}(?!\S)" for n in range(9, 1, -1)), r"\s{1,2}(?!\S)", r"\s"]))),
    **_named("minicpm5", r"\p{N}{1,3}", _words(r"\p{N}+"), whole=True),
    **_named("k2-horizon", _words(letters="[\\p{L}\\p{M}\u200c\u200d]+")),
    **_named("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", _words(r"\p{N}")),
    **_named("qwen35", _words(r"\p{N}", letters=r"[\p{L}\p{M}]+", others=r"\s\p{L}\p{M}\p{N}")),
    **_named("bailingmoe bailingmoe2 llada-moe", _words(r"\p{N}", lines=r"\s*[\r\n]")),
    **_named("seed-coder", _words(r"\p{N}", end="")),
    **_named("ufakzeka", _words(r"\p{N}", contractions="")),
    **_named("laguna", r"[^\n]+|\n+", _words(r"\p{N}")),
    **_named("exaone-moe", _words(r"\p{N}", letters=r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+", end=r"[\r\n/]?", lines=r"\s*[\r\n]")),
    **_named("gpt-4o llama4 kanana2 talkie minimax-m2", _cased_words()),
    **_named("granite-embed-multi-97m", _cased_words(**_MARKED), whole=True),
    **_named("tekken", _cased_words(r"\p{N}", contractions=""), whole=True, begins=True),
    **_named(
        "youtu",
        f"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，\u3001-\u303f\ufe30-\ufe4f]+|[ㄅ-ㄯ]+|{_CHINESE}",
        _cased_words(r"\p{N}", **_ALL_LETTERS),
        whole=True,
    ),
    **_named("tiny_aya cohere2moe", _THOUSANDS, _cased_words(**_ALL_LETTERS)),
    **_named(
        "kimi-k2",
        rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_GAPS}",
    ),
    **_named(
        "deepseek-llm",
        r"[\r\n]",
        rf"\s?[{_CASED}]+",
        r"\s?[!-/:-~！-／：-～‘-‟\u3001\u3002]+",
        r"\s+\z",
        _ASIAN,
        r"\p{N}+",
    ),
    **_named("deepseek-coder", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}"),
    **_named("deepseek-v3 hunyuan-dense joyai-llm hy_v4", *_DEEPSEEK3),
    **_named("spark2_5", *_DEEPSEEK3[:2], rf"{_SIGNED_WORDS}|[\r\n]|{_GAPS}", r"\p{N}"),
    **_named("afmoe", _THOUSANDS, _EAST, _DEEPSEEK3[2]),
    **_named("falcon", r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]"),
    **_named("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", r"\p{N}", _GPT2),
    **_named("gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert exaone4", _GPT2),
    **_named("jina-v1-en jina-v2-code roberta-bpe mpt olmo jais trillion granite-docling", _GPT2),
    **_named("poro-chat bloom gpt3-finnish", _NOT_STOPS),
    **_named("viking", _NOT_STOPS, r"\p{N}"),
    **_named("superbpe", r"\p{N}+", r"(?=(?:[0-9]{3})+(?![0-9]))"),
    **_named(
        "chameleon",
        "<sentinel:[0-9]+>",
        "IMGIMG[A-I]{1,4}Z",
        r"[\t\n]|    |  ",
        r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]",
        _GPT2,
        begins=True,
    ),
}
"""Name in `tokenizer.ggml.pre` -> rule."""


@dataclass
class Vocabulary:
    """The tokens of a file's metadata, checked.

    Attributes:
        own: the values under `tokenizer.ggml.`, by key without that prefix.
        where: the file, for messages.
        tokens: texts by id.
        types: int64 (tokens,); see `UNKNOWN`.
        words: the rule of words; None for SentencePiece's pieces.
    """

    own: dict[str, object]
    where: str
    tokens: list[str]
    types: NDArray[np.int64]
    words: Words | None

    @classmethod
    def read(cls, metadata: Mapping[str, object], where: str) -> Vocabulary:
        """Check every key under `tokenizer.`, and read the tokens.

        Raises:
            GradlessError: a key is unknown, or the tokens are of another kind, missing, or repeated.
        """
        own = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
        known = {*(PREFIX + name for name in (*READ, *NEUTRAL)), "tokenizer.huggingface.json", CHAT_TEMPLATES}
        for key in metadata:
            if key.startswith("tokenizer.") and key not in known and not _names_chat_template(key):
                raise GradlessError(f"{where}: the key {key} is unknown; the file cannot be tokenized.")
        kind = own.get("model")
        if kind not in ("gpt2", "llama"):
            raise GradlessError(f"{where}: its tokenizer ({PREFIX}model) is {kind!r}; gpt2 and llama are supported.")
        pre, words = own.get("pre", "default"), None
        if kind == "gpt2":
            words = WORDS.get(pre) if isinstance(pre, str) else None
            if words is None:
                raise GradlessError(f"{where}: its words ({PREFIX}pre) are {pre!r}; supported are {', '.join(WORDS)}.")
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(_listed(own, "tokens", where))]
        if len(set(tokens)) < len(tokens):
            twice = next(token for token, count in Counter(tokens).items() if count > 1)
            raise GradlessError(f"{where}: the token {twice!r} is in its vocabulary twice.")
        types: NDArray[np.int64] = np.ones(len(tokens), np.int64)
        if "token_type" in own:
            types = _numbers(own, "token_type", len(tokens), where).astype(np.int64)
        self = cls(own, where, tokens, types, words)
        self._take_for_control()
        return self

    def _take_for_control(self) -> None:
        """Set the types that llama.cpp gives to tokens by their texts."""
        for texts, type_ in ((CONTROL_TEXTS, CONTROL), (USER_DEFINED_TEXTS, USER_DEFINED)):
            for text in texts & self.numbers.keys():
                self.types[self.numbers[text]] = type_

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Token ids by text."""
        return {token: i for i, token in enumerate(self.tokens)}

    @property
    def special(self) -> NDArray[np.bool_]:
        """Which tokens are found in a text before all others: bool (tokens,)."""
        return np.isin(self.types, (UNKNOWN, CONTROL, USER_DEFINED))

    def number(self, name: str, default: int | None = None) -> int | None:
        """The id of the special token under `name`. As in llama.cpp, an id without a token counts as missing."""
        number = self.own.get(name, default)
        if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
            raise GradlessError(f"{self.where}: {PREFIX}{name} is {number!r}, not the number of a token.")
        return number if number is not None and 0 <= number < len(self.tokens) else default

    def says(self, name: str, default: bool) -> bool:
        said = self.own.get(name, default)
        if not isinstance(said, bool):
            raise GradlessError(f"{self.where}: {PREFIX}{name} is {said!r}, not true or false.")
        return said


def load_tokenizer(path: str | Path) -> types.Tokenizer:
    """The tokenizer of a GGUF file; see `build_tokenizer`."""
    return build_tokenizer(read_header(Path(path)).metadata, str(path))


def build_tokenizer(metadata: Mapping[str, object], where: str) -> types.Tokenizer:
    """The tokenizer that a GGUF file's metadata describes: a `PreTrainedTokenizerFast`.

    Args:
        metadata: values by key; arrays are NumPy arrays or sequences of strings.
        where: the file, for messages.

    Raises:
        GradlessError: the kind, the rule of words or a key is unknown, or the metadata contradict themselves.
    """
    from transformers import PreTrainedTokenizerFast

    vocabulary = Vocabulary.read(metadata, where)
    made = _merging_bytes(vocabulary, vocabulary.words) if vocabulary.words else _merging_pieces(vocabulary)
    made.add_tokens(_looked_for(vocabulary, str(metadata.get("general.name", "")).lower()))
    defaults = {} if vocabulary.words else {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    numbers = {name: vocabulary.number(key, defaults.get(key)) for name, key in SPECIAL_IDS.items()}
    made.post_processor = _around(vocabulary, numbers["bos_token"], numbers["eos_token"])
    vars(made)["__deepcopy__"] = lambda _: made  # transformers copies it through JSON, which takes seconds
    names = {name: vocabulary.tokens[i] for name, i in numbers.items() if i is not None}
    special = {name: token for name, token in names.items() if vocabulary.special[numbers[name]]}
    tokenizer: types.Tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=_chat_template(metadata, where), clean_up_tokenization_spaces=False, **special
    )
    for name in names.keys() - special.keys():
        setattr(tokenizer, name, names[name])  # not in the constructor, which would make it a special token
    return tokenizer


def _merging_bytes(vocabulary: Vocabulary, words: Words) -> Tokenizer:
    """A tokenizer that merges bytes of words in the file's order. A byte without a token is dropped."""
    stand_ins = bytes_to_text()
    missing = [stand_ins[byte] for byte in _BYTES_OF_TEXT if stand_ins[byte] not in vocabulary.numbers]
    merges = []
    for merge in _listed(vocabulary.own, "merges", vocabulary.where):
        at = merge.find(" ", 1)
        merges.append((merge[:at], merge[at + 1 :]))
    try:
        model = models.BPE(vocabulary.numbers, list(dict.fromkeys(merges)), ignore_merges=words.whole)
    except Exception as error:  # the library has no narrower type
        raise GradlessError(f"{vocabulary.where}: its merges do not fit its tokens: {error}.") from error
    made = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in words.splits]
    as_bytes = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    dropped = [pre_tokenizers.Split(Regex(f"[{re.escape(''.join(missing))}]"), "removed")] if missing else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, *as_bytes, *dropped])
    made.decoder = decoders.ByteLevel()
    return made


def _merging_pieces(vocabulary: Vocabulary) -> Tokenizer:
    """A tokenizer that merges SentencePiece's pieces by score. A character without a piece is spelled in bytes."""
    missing = [byte for byte in _BYTES_OF_TEXT if f"<0x{byte:02X}>" not in vocabulary.numbers]
    if missing:
        raise GradlessError(f"{vocabulary.where}: its pieces lack the byte <0x{missing[0]:02X}>, so some texts have no tokens.")
    made = Tokenizer(models.BPE(vocabulary.numbers, _merges_by_score(vocabulary), byte_fallback=True))
    before = [normalizers.Prepend(SPACE)] if vocabulary.says("add_space_prefix", True) else []
    made.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if before else []
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    return made


def _merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The pairs of tokens whose merge is a token, highest score first.

    Among the pairs of one piece the longest first half comes first: of two overlapping pairs, as in "aa" "a" "aa", the left one
    is merged. SentencePiece merges two pieces of equal score from left to right, which no order of pairs can express. Tokens
    that are found in a text before all others are no result of a merge, unless they hold the character for a space.

    Raises:
        GradlessError: two results of merges have equal scores.
    """
    scores = _numbers(vocabulary.own, "scores", len(vocabulary.tokens), vocabulary.where)
    apart = vocabulary.special | (vocabulary.types == BYTE)
    pieces = {token for token, out in zip(vocabulary.tokens, apart.tolist(), strict=True) if not out or SPACE in token}
    merges, made_of = [], []
    for number, token in enumerate(vocabulary.tokens):
        if len(token) > 1 and token in pieces:
            for at in range(len(token) - 1, 0, -1):
                if (left := token[:at]) in pieces and (right := token[at:]) in pieces:
                    merges.append((left, right))
                    made_of.append(number)
    made = np.unique(made_of)
    ordered = made[np.argsort(scores[made], kind="stable")]
    same = np.flatnonzero(np.diff(scores[ordered]) == 0)
    if len(same) or np.isnan(scores).any():
        one, two = (vocabulary.tokens[i] for i in ordered[same[0] :][:2]) if len(same) else ("?", "?")
        raise GradlessError(
            f"{vocabulary.where}: its pieces {one!r} and {two!r} have equal scores, so no order of merges "
            "says which comes first; convert the model again, from its own tokenizer.model."
        )
    return [merges[i] for i in np.argsort(-scores[made_of], kind="stable").tolist()]


def _around(vocabulary: Vocabulary, bos: int | None, eos: int | None) -> processors.TemplateProcessing:
    """The processor that adds the tokens at the beginning and the end of a sequence."""
    begins = vocabulary.says("add_bos_token", vocabulary.words is None or vocabulary.words.begins)
    ends = vocabulary.says("add_eos_token", False)
    for said, number, name in ((begins, bos, "bos"), (ends, eos, "eos")):
        if said and number is None:
            raise GradlessError(
                f"{vocabulary.where}: each text gets an {name} token, but no {PREFIX}{name}_token_id says which."
            )
    head, tail = ["bos"] * begins, ["eos"] * ends
    return processors.TemplateProcessing(
        single=[*head, "$A", *tail],
        pair=[*head, "$A", *tail, *(f"{name}:1" for name in head), "$B:1", *(f"{name}:1" for name in tail)],
        special_tokens=[
            {"id": name, "ids": [number], "tokens": [vocabulary.tokens[number]]}
            for name, number in (("bos", bos), ("eos", eos))
            if number is not None and name in head + tail
        ],
    )


def _looked_for(vocabulary: Vocabulary, model: str) -> list[AddedToken]:
    """The tokens that are found in a text before all others, with the white space that they absorb."""
    before = {"<mask>"} if str(vocabulary.own.get("pre")) in ("jina-v2-de", "jina-v2-es", "jina-v2-code") else set()
    phi3 = "phi-3" in model or "phi3" in model
    found = []
    for number in np.flatnonzero(vocabulary.special).tolist():
        text, control = vocabulary.tokens[number], vocabulary.types[number] != USER_DEFINED
        after = phi3 and text not in ("<unk>", "<s>", "<|endoftext|>")
        found.append(AddedToken(text, lstrip=text in before, rstrip=after, normalized=False, special=bool(control)))
    return found


def _chat_template(metadata: Mapping[str, object], where: str) -> str | dict[str, str] | None:
    """The file's chat template, or a dictionary of several by name."""
    found = {
        key.removeprefix(CHAT_TEMPLATE).lstrip(".") or "default": metadata[key] for key in metadata if _names_chat_template(key)
    }
    texts = {name: text for name, text in found.items() if isinstance(text, str)}
    if wrong := [name for name in found if name not in texts]:
        raise GradlessError(f"{where}: its chat template {wrong[0]!r} is no text.")
    return texts.get("default") if texts.keys() <= {"default"} else texts


def _names_chat_template(key: str) -> bool:
    return key == CHAT_TEMPLATE or key.startswith(CHAT_TEMPLATE + ".")


def _listed(own: Mapping[str, object], name: str, where: str) -> Sequence[str]:
    listed = own.get(name)
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not len(listed):
        raise GradlessError(f"{where}: its tokenizer has no list {PREFIX}{name}.")
    return listed


def _numbers(own: Mapping[str, object], name: str, count: int, where: str) -> NDArray[np.number]:
    """An array with one number for each token, of any type."""
    numbers = own.get(name)
    if not isinstance(numbers, np.ndarray) or len(numbers) < count:
        raise GradlessError(f"{where}: {PREFIX}{name} does not hold a number for each of {count:,} tokens.")
    return np.array(numbers[:count])


def bytes_to_text() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
