"""What the fuzzer tries: how each file is made from a random number generator, and what reads it."""

from __future__ import annotations

import atexit
import io
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from gradless.formats import folder as folders
from gradless.formats.gguf import GGUFFile
from gradless.readers import gguf as gguf_reader
from gradless.readers import json as json_reader
from gradless.readers import safetensors as safetensors_reader
from tests.fuzz import mutate, seeds


@dataclass
class Target:
    """Something that reads files.

    Attributes:
        name: for the report.
        make: writes a mutated file, or folder, into an empty folder; returns what `read` is given.
        read: reads it.
    """

    name: str
    make: Callable[[Path, Random], Path]
    read: Callable[[Path], object]


def _written(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


# -- parsers ----------------------------------------------------------------------------------------------------------


def _gguf() -> Target:
    valid, bad = seeds.gguf_file(), list(seeds.bad_ggufs().values())
    every = [file.raw() for file in (valid, *bad)]

    def make(folder: Path, random: Random) -> Path:
        file = valid if random.random() < 0.7 else random.choice(bad)
        raw = mutate.of_gguf(file, random) if random.random() < 0.6 else mutate.of_bytes(file.raw(), random, every)
        return _written(folder / "a.gguf", raw)

    def read(path: Path) -> None:
        header = gguf_reader.read_header(path)
        for value in header.metadata.values():
            if isinstance(value, gguf_reader.Strings):
                list(value)
        GGUFFile.open(path)

    return Target("gguf", make, read)


def _safetensors() -> Target:
    header, bad = seeds.safetensors_header(), list(seeds.bad_safetensors().values())
    bad = [raw for raw in bad if len(raw) < 10_000]

    def make(folder: Path, random: Random) -> Path:
        if random.random() < 0.6:
            text = mutate.of_json(header, random)
            raw = len(text).to_bytes(8, "little") + text + bytes(48)
        else:
            raw = mutate.of_bytes(random.choice((seeds.safetensors(header, bytes(48)), random.choice(bad))), random, bad)
        return _written(folder / "a.safetensors", raw)

    return Target("safetensors", make, safetensors_reader.read_header)


def _json() -> Target:
    def make(folder: Path, random: Random) -> Path:
        content = random.choice((seeds.CONFIG, seeds.INDEX))
        raw = mutate.of_json(content, random)
        if random.random() < 0.4:
            raw = mutate.of_bytes(json.dumps(content).encode(), random, [raw])
        name = "config.json" if content is seeds.CONFIG else folders.INDEX
        (folder / "model").mkdir()
        _written(folder / "model" / name, raw)
        return folder / "model"

    def read(path: Path) -> None:
        for file in path.iterdir():
            json_reader.read_object(file, infinities=True)
        folders.quantization(path)
        if (path / folders.INDEX).exists():
            folders.weight_files(path)

    return Target("json", make, read)


PARSERS: dict[str, Callable[[], Target]] = {"gguf": _gguf, "safetensors": _safetensors, "json": _json}


# -- whole loads ------------------------------------------------------------------------------------------------------


@cache
def _models() -> Path:
    """A folder of tiny models: model.gguf, dense, gptq, packed, adapter."""
    from gradless.cli import main
    from tests.checkpoint_folders import quantized_folder
    from tests.tiny import tiny_gguf

    made = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, made)
    tiny_gguf(made / "model.gguf")
    assert main(["dequantize", str(made / "model.gguf"), "--output", str(made / "dense")]) == 0
    assert main(["quantize", str(made / "dense"), "--bits", "4", "--output", str(made / "packed")]) == 0
    quantized_folder(made / "dense", made / "gptq", "gptq-4", shards=2)
    return made


def _edited_safetensors(raw: bytes, random: Random) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    if random.random() < 0.4:
        return mutate.of_bytes(raw, random, [raw[:500]], front=8 + length)
    if random.random() < 0.2:
        return mutate.of_bytes(raw, random, [raw[:500]])
    text = mutate.of_json(json.loads(raw[8 : 8 + length]), random)
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def _folder(name: str, load: Callable[[Path], object]) -> Target:
    """One of the models, with one of its files edited."""
    source = _models() / name

    def make(folder: Path, random: Random) -> Path:
        path = folder / "model"
        shutil.copytree(source, path)
        files = sorted(path.iterdir())
        config = [file for file in files if file.name == "config.json"]
        weights = [file for file in files if file.suffix == ".safetensors"]
        file = random.choice(random.choice((config, weights, files)))
        raw = file.read_bytes()
        if file.suffix == ".safetensors":
            raw = _edited_safetensors(raw, random)
        elif file.suffix == ".json" and random.random() < 0.85:
            raw = mutate.of_json(json.loads(raw), random)
        else:
            raw = mutate.of_bytes(raw, random, [raw])
        file.write_bytes(raw)
        return path

    return Target(name, make, load)


def _load_gguf() -> Target:
    from gradless.formats.gguf_model import load_gguf

    source = _models() / "model.gguf"
    raw, header = source.read_bytes(), GGUFFile.open(source)
    front = min(info.offset for info in header.tensors.values())
    entries = mutate.Gguf.parsed(raw, front)

    def make(folder: Path, random: Random) -> Path:
        made = (
            mutate.of_gguf(entries, random)
            if random.random() < 0.6
            else mutate.of_bytes(raw, random, [raw[:4000]], front=front)
        )
        return _written(folder / "model.gguf", made)

    return Target("load_gguf", make, load_gguf)


def _load_folder(name: str) -> Callable[[], Target]:
    def made() -> Target:
        from gradless.formats.folder_model import load_folder

        return _folder(name, load_folder)

    return made


def _load_dense() -> Target:
    from gradless.formats.dense import DenseModel

    return _folder("dense", DenseModel.load)


def _adapter() -> Target:
    from gradless.formats.adapter import AdaptedModel, LoRA, attach_peft
    from gradless.formats.dense import DenseModel

    base = DenseModel.load(_models() / "dense")
    if not (_models() / "adapter").exists():
        adapted = AdaptedModel(base, LoRA(4))
        adapted.spaces("codes", adapted.tunable("codes"))
        adapted.save(_models() / "adapter")
        base = DenseModel.load(_models() / "dense")
    target = _folder("adapter", lambda path: attach_peft(base, path))
    source = _models() / "adapter"

    def make(folder: Path, random: Random) -> Path:
        path = folder / "adapter"
        shutil.copytree(source, path)
        file = random.choice(sorted(path.iterdir()))
        raw = file.read_bytes()
        weights = file.suffix == ".safetensors"
        file.write_bytes(_edited_safetensors(raw, random) if weights else mutate.of_json(json.loads(raw), random))
        return path

    target.make = make
    return target


def _journal() -> Target:
    from gradless.journal import Journal
    from gradless.replaying import replay

    runs = Path(__file__).parents[1] / "old_runs"
    journals = sorted(runs.glob("*.db"))

    def make(folder: Path, random: Random) -> Path:
        source = random.choice(journals)
        path = folder / "journal.db"
        if random.random() < 0.4:
            return _written(path, mutate.of_bytes(source.read_bytes(), random, [source.read_bytes()[:4096]]))
        with sqlite3.connect(source) as held:
            header = {name: json.loads(value) for name, value in held.execute("SELECT name, value FROM header")}
        steps = list(Journal.open(source).estimates())
        header.pop("format")
        if random.random() < 0.7:
            with suppress(ValueError, RecursionError):
                edited = json.loads(mutate.of_json(header, random))
                header = edited if isinstance(edited, dict) else header
        journal = Journal.create(path, header)
        for step in steps:
            journal.append(step, 0.0)
        journal.finish()
        with sqlite3.connect(path) as forged:
            if random.random() < 0.3:
                value = mutate.of_json([1.0, [2.0, 3.0], "abc"], random).decode("utf-8", "replace")
                forged.execute(f"UPDATE steps SET {random.choice(('losses', 'estimate', 'lr'))} = ? WHERE step = 1", (value,))
        forged.close()
        return path

    def read(path: Path) -> None:
        replay(str(runs / "base.gguf"), str(path), str(path.with_name("out.gguf")), overwrite=True, quiet=True)

    with tempfile.TemporaryDirectory() as folder:  # what is imported on the way is no part of a file's time
        read(Path(shutil.copy(journals[0], folder)))
    return Target("journal", make, read)


def _npz() -> Target:
    from gradless.attacks.run import read_images

    def make(folder: Path, random: Random) -> Path:
        held = io.BytesIO()
        arrays: dict[str, Any] = {"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": np.arange(2)}
        if random.random() < 0.3:
            arrays["images"] = random.choice(
                (
                    np.zeros((2, 3), np.float16),
                    np.array(["a"]),
                    np.zeros(0),
                    np.zeros((2, 2), complex),
                    np.array(3.0),
                    np.zeros((1, 1), ">f4"),
                )
            )
        if random.random() < 0.2:
            arrays["labels"] = random.choice(
                (np.array(["a"]), np.zeros(()), np.zeros(3), np.array([True, False]), np.array([2**63], np.uint64))
            )
        (np.savez_compressed if random.random() < 0.5 else np.savez)(held, **arrays)
        raw = held.getvalue()
        return _written(folder / "a.npz", mutate.of_bytes(raw, random, [raw]) if random.random() < 0.9 else raw)

    return Target("npz", make, read_images)


def _queries() -> Target:
    from gradless.attacks.log import QueryLog

    def make(folder: Path, random: Random) -> Path:
        path = folder / "queries.db"
        QueryLog(path, {"a": 1}).close()
        raw = path.read_bytes()
        return _written(path, mutate.of_bytes(raw, random, [raw[:4096]]))

    def read(path: Path) -> None:
        QueryLog(path, {"a": 1}).close()

    return Target("queries", make, read)


def _described(name: str) -> Callable[[], Target]:
    """What `gradless info` and `gradless plan` make of a model."""

    def made() -> Target:
        from gradless.memory import FIRST_ORDER, plan, shapes_of
        from gradless.methods.registry import RECIPES
        from gradless.report.info import as_text, describe

        target = _load_gguf() if name == "model.gguf" else _folder(name, describe)

        def read(path: Path) -> None:
            as_text(describe(str(path)))
            plan(shapes_of(path), [*FIRST_ORDER, *RECIPES], batch_size=16, length=128)

        return Target("described " + name, target.make, read)

    return made


LOADS: dict[str, Callable[[], Target]] = {
    "load_gguf": _load_gguf,
    "gptq": _load_folder("gptq"),
    "packed": _load_folder("packed"),
    "dense": _load_dense,
    "adapter": _adapter,
    "info-gguf": _described("model.gguf"),
    "info-folder": _described("gptq"),
    "journal": _journal,
    "npz": _npz,
    "queries": _queries,
}
