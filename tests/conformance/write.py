"""Fill the cells of docs/models.md and write it: `python -m tests.conformance.write`.

    --cells FILE      where cells are kept, a JSON line each; those that it holds are not tried again (default: in /tmp)
    --kinds A,B       these architectures alone (default: all)
    --formats A,B     these formats of folders alone, or GGUF (default: all)

It can be stopped at any time and goes on where it was. The page is written from all cells that are kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import transformers

from gradless.formats.gguf_config import ARCHITECTURES
from tests.conformance import folders, page
from tests.conformance.architectures import KINDS
from tests.conformance.cells import Cell, check
from tests.conformance.gguf_files import GGUF, check_gguf, names

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def kept(path: Path) -> dict[tuple[str, str], Cell]:
    """The cells that a file holds, by architecture and format; the last of each."""
    lines = path.read_text().splitlines() if path.is_file() else []
    cells = [Cell(**json.loads(line)) for line in lines]
    return {(cell.architecture, cell.format): cell for cell in cells}


def places(kinds: Sequence[str], formats: Sequence[str]) -> list[tuple[str, str]]:
    """Architecture and format of the cells to fill."""
    of_folders = [(kind, form) for kind in kinds if kind in KINDS for form in formats if form in folders.ALL]
    return of_folders + [(kind, form) for kind, form in names() if kind in kinds and GGUF in formats]


def main() -> None:
    """Fill, then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=Path(tempfile.gettempdir()) / "gradless-cells.jsonl")
    parser.add_argument("--kinds", default=",".join(dict.fromkeys((*KINDS, *ARCHITECTURES))))
    parser.add_argument("--formats", default=",".join((*folders.ALL, GGUF)))
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gc.freeze()  # accelerate collects garbage in every run, and what is imported is none
    done = kept(asked.cells)
    for kind, form in places(asked.kinds.split(","), asked.formats.split(",")):
        if (kind, form) not in done:
            with tempfile.TemporaryDirectory() as folder, asked.cells.open("a") as file:
                cell = done[kind, form] = (check if form in folders.ALL else check_gguf)(kind, form, Path(folder))
                file.write(json.dumps(asdict(cell)) + "\n")
            print(f"{kind} in {form}: {cell.state} {'; '.join(cell.faults) or cell.refused}", flush=True)
    PAGE.write_text(page.written(list(done.values())))


if __name__ == "__main__":
    main()
