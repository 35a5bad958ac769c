"""Mutations: of bytes, of JSON's values, and of a GGUF header's entries."""

from __future__ import annotations

import copy
import json
import struct
from dataclasses import dataclass, field
from random import Random
from typing import Any

INTERESTING = sorted(
    {0, 1, 2, 3, 7, 8, 31, 32, 64, 127, 128, 255, 256, 1000, 4096, 65535, 65536, 100_000}
    | {2**n + more for n in (15, 16, 24, 31, 32, 40, 48, 53, 61, 62, 63, 64) for more in (-1, 0, 1)}
)
DEEP = "stands for what is nested deeply"
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        [],
        {},
        [[]],
        "",
        "4",
        "x" * 300,
        "\x00",
        "../../etc",
        "ä😀",
        "\ud800",
        -1,
        -2,
        0.5,
        1e300,
        10**30,
        10**300,
    ),
    *(float("nan"), float("inf"), [1, 2, 3], {"a": 1}, ["a", None], *INTERESTING),
)


def of_bytes(raw: bytes, random: Random, others: list[bytes], front: int | None = None) -> bytes:
    """One to four edits of some bytes, most of them among the first `front`; `others` are spliced in."""
    made = bytearray(raw)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        size = len(made)
        near = min(size, front or size) if random.random() < 0.9 else size
        at = random.randrange(max(near, 1))
        match random.randrange(9):
            case 0 if size:
                made[at] ^= 1 << random.randrange(8)
            case 1 if size:
                made[at] = random.randrange(256)
            case 2 | 3:
                width = random.choice((1, 2, 4, 8, 8, 8))
                value = random.choice(INTERESTING) if random.random() < 0.8 else size + random.randint(-64, 64)
                made[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, random.choice(("little", "little", "big")))
            case 4:
                del made[at:]
            case 5:
                del made[at : at + random.choice((1, 4, 8, 32, 500))]
            case 6:
                end = at + random.choice((1, 4, 8, 32, 500))
                made[at:at] = made[at:end] * random.choice((1, 1, 2, 50))
            case 7:
                other = random.choice(others)
                start = random.randrange(max(len(other), 1))
                made[at : at + random.choice((0, 16, 64))] = other[start : start + random.choice((16, 64, 400))]
            case 8:
                made[at:at] = random.randbytes(random.choice((1, 8, 64)))
    return bytes(made)


def of_json(content: Any, random: Random) -> bytes:
    """An edit of one of a JSON document's values, or of its text."""
    content = copy.deepcopy(content)
    for _ in range(random.choice((1, 1, 2))):
        places = _places(content)
        if not places:
            break
        holder, key = random.choice(places)
        match random.randrange(7):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(random.choice(VALUES))
            case 3:
                del holder[key]
            case 4:
                holder[key] = DEEP
            case 5 if isinstance(holder[key], int) and not isinstance(holder[key], bool):
                holder[key] += random.choice((-1, 1, 7, 1 << 20, 1 << 40))
            case _:
                other, name = random.choice(places)
                holder[key] = copy.deepcopy(
                    other.get(name) if isinstance(other, dict) else other[name] if name < len(other) else 0
                )
    depth, (opened, closed) = random.choice((2, 50, 3000, 100_000)), random.choice((("[", "]"), ('{"a":', "}")))
    text = json.dumps(content).replace(json.dumps(DEEP), opened * depth + "0" + closed * depth)
    if random.random() < 0.05:
        text = text.replace('"', "'", 1) if random.random() < 0.5 else text[: random.randrange(len(text) + 1)]
    if random.random() < 0.05 and text.endswith("}") and ":" in text:  # a name twice
        text = text[:-1] + "," + text[1:]
    if random.random() < 0.02:
        text = text.replace("1", "1" * 5000, 1)
    return text.encode("utf-8", "surrogatepass")


def _places(content: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of up to a thousand values, at any depth."""
    found, level = [], [content]
    while level and len(found) < 1000:
        holder = level.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        found += [(holder, key) for key in keys]
        level += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    return found


@dataclass
class Gguf:
    """A GGUF file as its entries, each of which may lie.

    Attributes:
        keys: (name, number of the type, bytes of the value).
        tensors: (name, dimensions, number of the type, offset).
        data: all weights.
        counts: what the header says of tensors and keys, or None for the truth.
    """

    keys: list[tuple[bytes, int, bytes]]
    tensors: list[tuple[bytes, list[int], int, int]]
    data: bytes = b""
    version: int = 3
    alignment: int = 32
    counts: list[int | None] = field(default_factory=lambda: [None, None])

    @classmethod
    def parsed(cls, raw: bytes, front: int) -> Gguf:
        """A valid file, whose data begin at byte `front`."""
        sizes = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), (1, 1, 2, 2, 4, 4, 4, 1, 8, 8, 8), strict=True))
        at = 24

        def take(count: int) -> bytes:
            nonlocal at
            at += count
            return raw[at - count : at]

        def number(width: int = 8) -> int:
            return int.from_bytes(take(width), "little")

        tensors, keys = struct.unpack("<QQ", raw[8:24])
        file = cls([], [], raw[front:])
        for _ in range(keys):
            name, kind = take(number()), number(4)
            begin = at
            if kind == 8:
                take(number())
            elif kind == 9:
                inner, count = number(4), number()
                for _ in range(count if inner == 8 else 0):
                    take(number())
                take(0 if inner == 8 else count * sizes[inner])
            else:
                take(sizes[kind])
            file.keys.append((name, kind, raw[begin:at]))
        for _ in range(tensors):
            file.tensors.append((take(number()), [number() for _ in range(number(4))], number(4), number()))
        return file

    def raw(self) -> bytes:
        """The file."""
        tensors, keys = (len(each) if n is None else n for each, n in zip((self.tensors, self.keys), self.counts, strict=True))
        head = b"GGUF" + struct.pack("<IQQ", self.version, tensors % 2**64, keys % 2**64)
        for name, kind, value in self.keys:
            head += text(name) + struct.pack("<I", kind % 2**32) + value
        for name, shape, kind, offset in self.tensors:
            head += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n % 2**64) for n in shape)
            head += struct.pack("<IQ", kind % 2**32, offset % 2**64)
        return head + bytes(-len(head) % self.alignment) + self.data


def text(value: bytes) -> bytes:
    """A string as GGUF holds it."""
    return struct.pack("<Q", len(value)) + value


def of_gguf(file: Gguf, random: Random) -> bytes:
    """Edits of a file's entries."""
    file = copy.deepcopy(file)
    for _ in range(random.choice((1, 1, 2, 3))):
        number = random.choice(INTERESTING)
        match random.randrange(8):
            case 0 if file.tensors:
                at = random.randrange(len(file.tensors))
                name, shape, kind, offset = file.tensors[at]
                match random.randrange(6):
                    case 0 if shape:
                        shape[random.randrange(len(shape))] = number
                    case 1:
                        shape = random.choice(([], [0], shape * 2, shape[::-1], [2**32, 2**32], [2**63], [1] * 300))
                    case 2:
                        kind = random.choice((*range(40), number))
                    case 3:
                        offset = random.choice((number, offset + 1, offset + 32, 2**64 - 32))
                    case 4:
                        name = random.choice((b"", file.tensors[0][0], b"\xff\xfe", b"a" * 300, name + b"x", b"\x00"))
                    case 5:
                        file.tensors.append((name, shape, kind, offset))
                file.tensors[at] = (name, shape, kind, offset)
            case 1 | 2 if file.keys:
                at = random.randrange(len(file.keys))
                name, kind, value = file.keys[at]
                match random.randrange(6):
                    case 0:
                        kind = random.choice((*range(14), number))
                    case 1 | 2:
                        value = of_bytes(value, random, [name], front=24)
                    case 3:
                        name = random.choice((b"", file.keys[0][0], b"\xc3\x28", b"general.alignment", b"k" * 70000))
                    case 4:
                        kind, value = random.choice(
                            ((4, struct.pack("<I", number % 2**32)), (8, text(b"x")), (6, b"\0\0\x80\x7f"))
                        )
                    case 5:
                        del file.keys[at]
                        continue
                file.keys[at] = (name, kind, value)
            case 3:
                file.counts[random.randrange(2)] = number
            case 4:
                file.alignment = random.choice((1, 8, 16, 64))
            case 5:
                value = random.choice((0, 1, 3, 8, 64, 2**31, number))
                file.keys.append(
                    (
                        b"general.alignment",
                        random.choice((4, 4, 10, 5)),
                        struct.pack("<Q", value % 2**64)[: random.choice((4, 8))],
                    )
                )
            case 6:
                file.data = file.data[: random.randrange(len(file.data) + 1)]
            case 7:
                kind = random.choice((*range(13), number % 2**32))
                array = struct.pack("<IQ", kind, number % 2**64) + random.randbytes(random.choice((0, 8, 64)))
                file.keys.append((b"new.key", 9, array))
    raw = file.raw()
    return of_bytes(raw, random, [raw]) if random.random() < 0.2 else raw
