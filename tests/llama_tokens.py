"""llama.cpp as the judge of tokens, through the C interface of the library that xllamacpp brings."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest


class _Parameters(ctypes.Structure):
    """llama.cpp's parameters of a model, which are only handed through: room for more of them than there are."""

    _fields_ = (("raw", ctypes.c_uint8 * 512),)


@cache
def _library() -> ctypes.CDLL:
    package = find_spec("xllamacpp")
    if package is None or package.origin is None:
        pytest.skip("needs xllamacpp")
    library = ctypes.CDLL(str(next(Path(package.origin).parent.glob("xllamacpp*.so"))))
    library.llama_model_default_params.restype = _Parameters
    library.llama_model_load_from_file.restype = library.llama_model_get_vocab.restype = ctypes.c_void_p
    library.llama_model_load_from_file.argtypes = (ctypes.c_char_p, _Parameters)
    library.llama_model_get_vocab.argtypes = library.llama_model_free.argtypes = (ctypes.c_void_p,)
    library.llama_tokenize.argtypes = (
        *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32),
        *(ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_bool, ctypes.c_bool),
    )
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    library.quiet = quiet  # kept: the library calls it
    library.llama_log_set.argtypes = (type(quiet), ctypes.c_void_p)
    library.llama_log_set(quiet, None)
    library.llama_backend_init()
    return library


def llama_tokens(path: Path, texts: list[str]) -> list[list[int]] | None:
    """What llama.cpp makes of texts, special tokens in them and around them included; None where it refuses the file."""
    library = _library()
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    if not model:
        return None
    vocabulary, found = library.llama_model_get_vocab(model), []
    for text in texts:
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 16))()
        count = library.llama_tokenize(vocabulary, raw, len(raw), ids, len(ids), True, True)
        found.append(list(ids[:count]))
    library.llama_model_free(model)
    return found
