"""The text of docs/models.md, from the cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version

import torch
import transformers

from tests.conformance import folders
from tests.conformance.cells import METHODS, Cell
from tests.conformance.gguf_files import GGUF

HEAD = """\
# Which models work

Tiny random models of every causal architecture that transformers {transformers} knows, each in every format that can hold it
(torch {torch}, on a CPU). The suite writes this page: `python -m tests.conformance.write`.

- **works**: the logits agree with those of transformers' own fp32 model of the same weights; each row of a batch has the loss
  that it has alone; `gradless dequantize` gives the same model; and three steps of every method are saved, read again with the
  same loss, and replayed to the byte. *not nzo [3]*: all of this, but the method is refused with sentence 3.
- **refused**: with the sentence below, before any computation.
- **-**: the format can hold none of the model's layers.

*rows* is the layout of a batch ([architecture.md](architecture.md)): packed end to end, padded, or one sequence in a forward
(alone).
"""
FILES = """\
## GGUF files

Log-probabilities are compared with llama.cpp's (xllamacpp {xllamacpp}): they agree within 1e-4 on a file in F32 (2e-3 if
llama.cpp reads GELU from a table of fp16), and within 0.2 on one in Q4_1. Rows, `dequantize` and methods are tested as above,
on the file in Q4_1. The last column lists more metadata and tensors, each compared with llama.cpp on a file in F32. A setting
that gradless does not read is refused by name.
"""
TUNED = """\
qzo and nzo tune the scales of blocks (nzo also the offsets, if the format has them; AQLM: one scale for each row or, with
`--part codebook`, the vectors). ezo tunes offsets or, without them, scales. quzo and zoqo tune integer codes. mezo tunes all
floats of a quantized model (norms, biases, everything that the format leaves out) and the linear layers of a dense one. Numbers
of tuned values, in the llama row:
"""


def written(cells: Iterable[Cell]) -> str:
    """The page: the architectures whose cells are all filled, with a footnote for each sentence."""
    by_place = {(cell.architecture, cell.format): cell for cell in cells}
    kinds = sorted({kind for kind, _ in by_place if all((kind, form) in by_place for form in folders.ALL)})
    notes: dict[str, int] = {}
    lines = [HEAD.format(transformers=transformers.__version__, torch=torch.__version__.partition("+")[0])]
    lines += ["| architecture | rows | " + " | ".join(folders.ALL) + " |", "|---" * (2 + len(folders.ALL)) + "|"]
    for kind in kinds:
        row = [by_place[kind, form] for form in folders.ALL]
        lines.append(f"| {kind} | {row[0].rows or '-'} | " + " | ".join(_shown(cell, notes) for cell in row) + " |")
    lines.append("")
    files = [cell for cell in by_place.values() if cell.format == GGUF]
    if files:
        lines += [
            FILES.format(xllamacpp=version("xllamacpp")),
            f"| architecture | rows | {GGUF} | other metadata and tensors |",
            "|---|---|---|---|",
        ]
    for cell in sorted(files, key=lambda cell: cell.architecture):
        shown = (cell.architecture, cell.rows or "-", _shown(cell, notes), _stated(cell.architecture, by_place, notes))
        lines.append("| " + " | ".join(shown) + " |")
    lines += ["", "## Sentences", "", *(f"{number}. {sentence}" for sentence, number in notes.items()), ""]
    example = [by_place["llama", form] for form in folders.ALL if ("llama", form) in by_place]
    lines += [TUNED, "| format | " + " | ".join(METHODS[True]) + " |", "|---" * (1 + len(METHODS[True])) + "|"]
    for cell in example:
        lines.append(f"| {cell.format} | " + " | ".join(str(cell.tuned.get(method, "-")) for method in METHODS[True]) + " |")
    return "\n".join(lines) + "\n"


def _stated(architecture: str, by_place: Mapping[tuple[str, str], Cell], notes: dict[str, int]) -> str:
    """The other metadata and tensors of an architecture's files, by the state of their cells."""
    found: dict[str, list[str]] = {}
    for (kind, form), cell in by_place.items():
        if kind == architecture and form.startswith(f"{GGUF}, "):
            name = form.removeprefix(f"{GGUF}, ").removeprefix(f"{kind}: ").removeprefix(f"{kind}, ")
            found.setdefault(_shown(cell, notes), []).append(name)
    return "; ".join(f"{state}: {', '.join(names)}" if state != "works" else ", ".join(names) for state, names in found.items())


def _shown(cell: Cell, notes: dict[str, int]) -> str:
    if cell.state != "works":
        return {"absent": "-", "open": "**open**"}.get(cell.state) or f"refused {_note(cell.refused, notes)}"
    refused: dict[str, list[str]] = {}
    for method, sentence in cell.methods.items():
        if sentence:
            refused.setdefault(_note(sentence, notes), []).append(method)
    return "works" + "".join(f", not {', '.join(methods)} {note}" for note, methods in refused.items())


def _note(sentence: str, notes: dict[str, int]) -> str:
    return f"[{notes.setdefault(sentence, len(notes) + 1)}]"
