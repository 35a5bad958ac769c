"""The compiled CPU kernels: `reference`'s functions to the bit, with the noise drawn inside the loops.

The library holds no Python and no torch headers; it is called through ctypes on the tensors' memory. Its OpenMP symbols
resolve to the runtime that torch has loaded, so both share one pool of threads.

Over 400 lines, because the structs and signatures that mirror the C++ stand beside the functions that pass them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradless.blocks import BlockType, Kind
from gradless.kernels import reference
from gradless.noise import Direction, Gaussian, Integers, Rademacher, RoundedGaussian, Signs, Stream, Words, key, normal_table
from gradless.tensor import BlockWeight, Move, Part, TunedCodes, TunedValues

NAME = "cpu"

_PARTS, _CODE = {Part.SCALE: 1, Part.OFFSET: 2, Part.BOTH: 3}, 4


class _Words(ctypes.Structure):
    _fields_ = (("key", ctypes.c_uint64), ("step", ctypes.c_uint32), ("query_and_stream", ctypes.c_uint32))


class _Direction(ctypes.Structure):
    _fields_ = (
        ("words", _Words),
        ("second", _Words),
        ("distribution", ctypes.c_int32),
        ("m", ctypes.c_int32),
        ("edges", ctypes.POINTER(ctypes.c_uint16)),
        ("eps", ctypes.c_float),
        ("weight", ctypes.c_float),
        ("next", ctypes.c_void_p),
        ("span", ctypes.c_int32),
        ("signs", ctypes.c_int32),
    )


class _Move(ctypes.Structure):
    _fields_ = (
        ("direction", _Direction),
        ("rounding", _Words),
        ("coefficient", ctypes.c_float),
        ("decay", ctypes.c_float),
    )


class _Blocks(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("all_blocks", ctypes.c_int64),
        ("blocks_per_value", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("part", ctypes.c_int32),
        ("relative", ctypes.c_int32),
        ("clamp", ctypes.c_int32),
        ("lowest", ctypes.c_int32),
        ("highest", ctypes.c_int32),
        ("zero", ctypes.c_int32),
        ("levels", ctypes.c_void_p),
        ("pieces", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
    )


class _Heads(ctypes.Structure):
    _fields_ = (("row", ctypes.c_int64), ("head", ctypes.c_int64), ("batch", ctypes.c_int64))


class _Attention(ctypes.Structure):
    _fields_ = (
        ("shared", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("q", _Heads),
        ("k", _Heads),
        ("v", _Heads),
        ("out", _Heads),
        ("mask", _Heads),
        ("scale", ctypes.c_float),
    )


N = TypeVar("N", bound=np.generic)

_STRUCTS = (_Words, _Direction, _Move, _Blocks, _Heads, _Attention)
"""The structs of native.cpp, in the order of its `gradless_sizes`."""

_BYTES, _N, _INT, _FLOAT, _TEXT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_char_p
_DIRECTION, _MOVES, _BLOCKS = (ctypes.POINTER(struct) for struct in (_Direction, _Move, _Blocks))
_READ = (_BLOCKS, _MOVES, _N, _N)
"""A weight, the moves of its views, how many moves, and how many rows."""

_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "kinds": (_TEXT, ()),
    "sizes": (ctypes.POINTER(_N), ()),
    "keep_freed_memory": (None, ()),
    "set_normal_table": (None, (_BYTES,)),
    "end_on_lost_page": (None, (_TEXT,)),
    "coordinates": (None, (_DIRECTION, _N, _BYTES)),
    "coordinates_of_each": (None, (_DIRECTION, _BYTES, _N, _N, _BYTES)),
    "whole_steps": (None, (_MOVES, _N, _BYTES, _BYTES)),
    "bytes": (None, (ctypes.POINTER(_Words), _N, _BYTES)),
    "dequantize": (None, (*_READ, _INT, _BYTES)),
    "multiplies_bf16": (_INT, ()),
    "choose_path": (_TEXT, (_INT,)),
    "linear_bf16": (None, (*_READ, _N, _BYTES, _BYTES)),
    "linear_int8_f32": (None, (*_READ, _N, _BYTES, _BYTES)),
    "linear_int8_bf16": (None, (*_READ, _N, _BYTES, _BYTES)),
    "add_shifts": (None, (*_READ, _N, _INT, _BYTES, _BYTES, _BYTES)),
    "vectors": (None, (_BYTES, _INT, _BYTES, _N, _N, _N, _N, _INT, _BYTES)),
    "move_blocks": (None, (_BLOCKS, _MOVES, _N, _N)),
    "move_codes": (_N, (_BLOCKS, _MOVES)),
    "moved": (None, (_MOVES, _N, _INT, _INT, _INT, _BYTES, _BYTES)),
    "rms_norm": (None, (_BYTES, _BYTES, _N, _N, _FLOAT, _FLOAT, _BYTES)),
    "gate": (None, (_BYTES, _BYTES, _INT, _N, _BYTES)),
    "attention": (None, (ctypes.POINTER(_Attention), _N, _N, *[_BYTES] * 5)),
}
"""Result and arguments of every function of the library, by its name after `gradless_`."""


def _load() -> ctypes.CDLL:
    """Load the library beside this file.

    Raises:
        OSError: it was not built, was built from other sources, or cannot run here.
    """
    for path in Path(__file__).parent.glob("_native*.so"):
        library = ctypes.CDLL(str(path))
        try:
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(library, f"gradless_{name}")
                function.restype, function.argtypes = result, arguments
        except AttributeError as error:
            raise OSError(f"{path.name} was built from other sources; install gradless again ({error})") from error
        kinds = library.gradless_kinds().decode().split()
        sizes = library.gradless_sizes()[: len(_STRUCTS)]
        if kinds != [kind.name for kind in Kind] or sizes != [ctypes.sizeof(struct) for struct in _STRUCTS]:
            raise OSError(f"{path.name} was built from other sources; install gradless again")
        library.gradless_keep_freed_memory()
        library.gradless_set_normal_table(normal_table().ctypes.data)
        return library
    raise OSError("the C++ kernels were not built (no compiler when gradless was installed)")


_library = _load()
LIBRARY = Path(_library._name)
"""The compiled file."""


def end_on_lost_page(sentence: str) -> None:
    """Print a sentence and end the process with 1 if, from now on, a mapped file becomes shorter and its lost part is read."""
    _library.gradless_end_on_lost_page(sentence.encode())


def coordinates(direction: Direction | Signs, name: str, n: int, device: torch.device) -> Tensor:
    """See `reference.coordinates`."""
    out = torch.empty(n, device=device)
    _library.gradless_coordinates(ctypes.byref(_direction(direction, name)), n, out.data_ptr())
    return out


def coordinates_of_each(direction: Direction, names: Sequence[str], n: int, device: torch.device) -> Tensor:
    """See `reference.coordinates_of_each`."""
    out, count = torch.empty(len(names), n, device=device), len(names)
    keys = (ctypes.c_uint64 * count)(*(key(direction.seed, name) for name in names))
    drawn = ctypes.byref(_direction(direction, names[0]))
    _library.gradless_coordinates_of_each(drawn, keys, count, n, out.data_ptr())
    return out


def whole_steps(name: str, move: Move, n: int, device: torch.device, residual: Tensor | None) -> Tensor:
    """See `reference.whole_steps`."""
    out = torch.empty(n, device=device)
    _library.gradless_whole_steps(
        ctypes.byref(_move(move, name)),
        n,
        None if residual is None else residual.data_ptr(),
        out.data_ptr(),
    )
    return out


def dequantize(weight: BlockWeight, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """See `reference.dequantize`."""
    out = torch.empty(weight.views.count, len(rows), weight.columns, dtype=dtype)
    rows = rows.contiguous()
    _library.gradless_dequantize(
        ctypes.byref(_blocks(weight, rows)),
        *_moves(weight.views.moves, weight.name),
        len(rows),
        dtype is torch.bfloat16,
        out.data_ptr(),
    )
    return out


def linear(weight: BlockWeight, rows: Tensor, x: Tensor) -> Tensor:
    """See `reference.linear`. If the processor multiplies bf16, products of bf16 unpack a few rows at a time, in panels."""
    if x.dtype is torch.bfloat16 and _library.gradless_multiplies_bf16():
        return _product(_library.gradless_linear_bf16, weight, rows, x)
    return reference.products(x, dequantize(weight, rows, x.dtype))


def linear_int8(weight: BlockWeight, rows: Tensor, x: Tensor) -> Tensor:
    """See `reference.linear_int8`."""
    assert weight.block.levels is None
    bf16 = x.dtype is torch.bfloat16
    return _product(_library.gradless_linear_int8_bf16 if bf16 else _library.gradless_linear_int8_f32, weight, rows, x)


def add_shifts(weight: BlockWeight, rows: Tensor, x: Tensor, y: Tensor) -> None:
    """See `reference.add_shifts`."""
    example_of_token = weight.views.example_of_token
    assert example_of_token is not None
    assert y.is_contiguous()
    x, rows, example_of_token = x.contiguous(), rows.contiguous(), example_of_token.contiguous()
    _library.gradless_add_shifts(
        ctypes.byref(_blocks(weight, rows)),
        *_moves(weight.views.moves, weight.name),
        len(rows),
        len(x),
        x.dtype is torch.bfloat16,
        x.data_ptr(),
        example_of_token.data_ptr(),
        y.data_ptr(),
    )


def _product(multiply: Callable[..., object], weight: BlockWeight, rows: Tensor, x: Tensor) -> Tensor:
    """x (views, m, columns) by the rows of a weight, through a function of the library."""
    assert x.shape[::2] == (weight.views.count, weight.columns)
    x, rows = x.contiguous(), rows.contiguous()
    out = torch.empty(*x.shape[:-1], len(rows), dtype=x.dtype)
    multiply(
        ctypes.byref(_blocks(weight, rows)),
        *_moves(weight.views.moves, weight.name),
        len(rows),
        x.shape[1],
        x.data_ptr(),
        out.data_ptr(),
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus: float) -> Tensor:
    """See `reference.rms_norm`."""
    x = x.contiguous()
    out, d = torch.empty_like(x), x.shape[-1]
    sizes = (x.numel() // d, d)
    _library.gradless_rms_norm(x.data_ptr(), weight.data_ptr(), *sizes, eps, plus, out.data_ptr())
    return out


def gate(gates: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
    """See `reference.gate`."""
    gates, up = gates.contiguous(), up.contiguous()
    out = torch.empty_like(up)
    _library.gradless_gate(gates.data_ptr(), up.data_ptr(), gelu, up.numel(), out.data_ptr())
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See `reference.attention`."""
    batch, heads, length, size = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(batch, length, heads, size, dtype=q.dtype)
    places = [_Heads(x.stride(2), x.stride(1), x.stride(0)) for x in (q, k, v, out.transpose(1, 2))]
    if mask is not None:
        mask = mask.expand(batch, 1, length, length)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        places.append(_Heads(mask.stride(2), 0, mask.stride(0)))
    how = _Attention(heads // k.shape[1], length, size, *places)
    how.scale = scale
    _library.gradless_attention(
        ctypes.byref(how),
        batch,
        k.shape[1],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        None if mask is None else mask.data_ptr(),
        out.data_ptr(),
    )
    return out


def choose_path(slower: int = 0) -> str | None:
    """Multiply integers by the fastest instructions of this processor, or the `slower`-th next to them.

    Returns:
        Their name; None if there are no such instructions.
    """
    name: bytes | None = _library.gradless_choose_path(slower)
    return None if name is None else name.decode()


def instructions() -> dict[str, str]:
    """See `reference.instructions`."""
    return {
        "int8": choose_path() or reference.NAME,
        "bf16": "AVX512-BF16" if _library.gradless_multiplies_bf16() else reference.NAME,
    }


def vectors(codes: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """See `reference.vectors`."""
    codebooks, size = codes.shape[-1], table.shape[1]
    entries = len(table) // codebooks
    if size % 8 or entries & (entries - 1):
        return reference.vectors(codes, table, dtype)
    codes, table = codes.contiguous(), table.contiguous()
    out = torch.empty(*codes.shape[:-1], size, dtype=dtype)
    _library.gradless_vectors(
        codes.data_ptr(),
        codes.dtype is torch.int16,
        table.data_ptr(),
        codebooks,
        entries,
        size,
        out.numel() // size,
        dtype is torch.bfloat16,
        out.data_ptr(),
    )
    return out.flatten(-2)


def move_blocks(weight: BlockWeight, moves: Sequence[Move]) -> None:
    """See `reference.move_blocks`."""
    _library.gradless_move_blocks(
        ctypes.byref(_blocks(weight)),
        *_moves(moves, weight.name),
        weight.tuned_values.values.numel(),
    )


def move_codes(weight: BlockWeight, move: Move) -> int:
    """See `reference.move_codes`."""
    return int(_library.gradless_move_codes(ctypes.byref(_blocks(weight)), ctypes.byref(_move(move, weight.name))))


def dither(name: str, shape: torch.Size) -> Tensor:
    """See `reference.dither`."""
    out = torch.empty(shape, dtype=torch.int8)
    words = _words(Direction(0, 0).words(name, Stream.DITHER))
    _library.gradless_bytes(ctypes.byref(words), out.numel(), out.data_ptr())
    return out


def moved(values: Tensor, name: str, move: Move, dtype: torch.dtype, *, stochastic: bool = False) -> Tensor:
    """See `reference.moved`."""
    values = values.contiguous()
    out = torch.empty(values.shape, dtype=dtype)
    _library.gradless_moved(
        ctypes.byref(_move(move, name)),
        values.numel(),
        values.dtype is torch.bfloat16,
        dtype is torch.bfloat16,
        stochastic and dtype is torch.bfloat16,
        values.data_ptr(),
        out.data_ptr(),
    )
    return out


def _words(words: Words) -> _Words:
    return _Words(words.key, words.step, words.query_and_stream)


def _direction(direction: Direction | Signs, name: str) -> _Direction:
    if isinstance(direction, Signs):
        following = None
        for term, weight in reversed(direction.terms):
            made = _direction(term, name)
            made.weight, made.next = np.float32(weight), following and ctypes.addressof(following)
            made.source, following = following, made  # keeps alive what the pointer refers to
        made.signs = True
        return made
    words = _words(direction.words(name))
    made = _Direction(words=words, second=words, span=direction.span)
    match direction.distribution:
        case Gaussian():
            made.distribution = 0
        case Rademacher():
            made.distribution = 1
        case Integers() as integers:
            made.distribution, made.m, made.edges = 2, integers.m, _edges(integers)
        case RoundedGaussian(eps, stream):
            made.distribution, made.second, made.eps = 3, _words(direction.words(name, stream)), np.float32(eps)
        case other:
            raise NotImplementedError(f"no compiled draw for {other}")
    return made


@cache
def _edges(distribution: Integers) -> ctypes.Array[ctypes.c_uint16]:
    return (ctypes.c_uint16 * (2 * distribution.m))(*distribution.edges)


def _move(move: Move, name: str) -> _Move:
    direction = _direction(move.direction, name)
    rounding = _words(move.direction.words(name, Stream.ROUNDING))
    made = _Move(direction, rounding, np.float32(move.coefficient), np.float32(move.decay))
    made.source = direction  # keeps alive what its pointers refer to
    return made


def _moves(moves: Sequence[Move], name: str) -> tuple[ctypes.Array[_Move], int]:
    """Moves as the library takes them: an array and its length."""
    n = len(moves)
    directions = [move.direction for move in moves if isinstance(move.direction, Direction)]
    if len(directions) == len(moves) > 2 and len({(u.seed, u.distribution, u.span) for u in directions}) == 1:
        return _many_alike(moves, directions, name), n
    made = [_move(move, name) for move in moves]
    array = (_Move * len(made))(*made)
    vars(array)["sources"] = made  # keeps alive what their pointers refer to
    return array, n


def _many_alike(moves: Sequence[Move], directions: Sequence[Direction], name: str) -> ctypes.Array[_Move]:
    """Moves along directions of one kind: the first of them many times, with other numbers in it."""
    first, size = _move(moves[0], name), ctypes.sizeof(_Move)
    array = (_Move * len(moves)).from_buffer_copy(bytes(first) * len(moves))
    vars(array)["sources"] = first  # keeps alive what its pointers refer to

    def column(offset: int, dtype: type[N]) -> NDArray[N]:
        """The field of every move that lies at byte `offset` of it."""
        return np.ndarray(len(moves), dtype, memoryview(array), offset, size)

    steps = np.array([u.step for u in directions], np.uint32)
    queries = np.array([u.query for u in directions], np.uint32)
    words = [_Move.direction.offset + _Direction.words.offset, _Move.direction.offset + _Direction.second.offset]
    for start in (*words, _Move.rounding.offset):
        column(start + _Words.step.offset, np.uint32)[:] = steps
        stream = column(start + _Words.query_and_stream.offset, np.uint32)
        stream[:] = stream & 0xFF | queries << 8
    column(_Move.coefficient.offset, np.float32)[:] = [float(move.coefficient) for move in moves]
    column(_Move.decay.offset, np.float32)[:] = [move.decay for move in moves]
    return array


@cache
def _code_layout(block: BlockType) -> tuple[int, Tensor, Tensor | None]:
    zero, pieces = block.layout()
    return zero, torch.stack(pieces), None if block.levels is None else torch.tensor(block.levels)


def _blocks(weight: BlockWeight, rows: Tensor | None = None) -> _Blocks:
    zero, pieces, levels = _code_layout(weight.block)
    made = _Blocks(
        packed=weight.packed.data_ptr(),
        rows=None if rows is None else rows.data_ptr(),
        blocks=weight.packed.shape[1],
        all_blocks=weight.packed.shape[0] * weight.packed.shape[1],
        blocks_per_value=weight.blocks_per_value,
        kind=weight.block.kind,
        lowest=weight.block.codes[0],
        highest=weight.block.codes[1],
        zero=zero,
        levels=None if levels is None else levels.data_ptr(),
        pieces=pieces.data_ptr(),
        stride=1,
    )
    match weight.tuned:
        case TunedValues(part, relative, values):
            made.part, made.relative, made.values = _PARTS[part], relative, values.data_ptr()
        case TunedCodes(stride, clamp, residual):
            made.part, made.stride, made.clamp = _CODE, stride, clamp
            made.residual = None if residual is None else residual.data_ptr()
    return made
