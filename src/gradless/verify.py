"""`gradless verify`: whether base, journal and tuned files belong together, and what can be salvaged of a damaged journal."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TypedDict

from gradless.errors import GradlessError
from gradless.files import checksums
from gradless.formats.hub import local
from gradless.formats.load import open_model
from gradless.journal import Journal
from gradless.replaying import check_base, replay

JOURNAL, SALVAGED = "journal.db", "journal.salvaged.db"
GOOD, BAD, UNKNOWN = "belongs", "does not belong", "unknown"


class Verdict(TypedDict):
    """What `verify` found."""

    steps: int
    finished: bool
    salvaged: str | None
    why: dict[str, str]
    journal: str
    base: str
    tuned: str
    whole: bool


def verify(run: str, *, base: str | None = None, salvage: bool = False) -> Verdict:
    """Check a run's folder. Nothing in it is changed, but `salvage` adds a file.

    Args:
        run: the folder, or a journal in it.
        base: the model that the run began with; without it only the run's own files are checked.
        salvage: if the journal is damaged, write the whole steps before the damage to a new journal beside it.

    Returns:
        `journal`, `base`, `tuned`: the state of each ("belongs", "does not belong", "unknown"); `why`: reasons, by the same
        names; `steps`; `finished`; `salvaged`: the path of the new journal; `whole`: whether nothing wrong was found.

    Raises:
        GradlessError: there is no journal, or not even its header can be salvaged.
    """
    folder = Path(run)
    path = folder / JOURNAL if folder.is_dir() else folder
    report: Verdict = {
        "steps": 0,
        "finished": False,
        "salvaged": None,
        "why": {},
        "journal": BAD,
        "base": UNKNOWN,
        "tuned": UNKNOWN,
        "whole": False,
    }
    try:
        journal = Journal.open(path)
    except GradlessError as error:
        if not path.is_file():
            raise
        report["why"]["journal"] = str(error)
        if salvage:
            report["steps"] = Journal.salvage(path, path.with_name(SALVAGED))
            report["salvaged"] = str(path.with_name(SALVAGED))
    else:
        report["journal"], report["steps"], report["finished"] = GOOD, journal.steps, journal.finished
        report["base"], why_base = _base(journal, base)
        report["tuned"], why_tuned = _tuned(journal, base)
        report["why"] = {part: why for part, why in (("base", why_base), ("tuned", why_tuned)) if why}
        journal.close()
    report["whole"] = BAD not in (report["journal"], report["base"], report["tuned"])
    return report


def _base(journal: Journal, base: str | None) -> tuple[str, str]:
    if base is None:
        return UNKNOWN, "give --base to check the model that the run began with"
    path = local(base)
    try:
        check_base(path, open_model(path), journal)
    except GradlessError as error:
        return BAD, str(error)
    return GOOD, ""


def _tuned(journal: Journal, base: str | None) -> tuple[str, str]:
    """The state of the tuned files: compared with the journal's checksums, or, if it has none, with a replay."""
    folder = journal.path.parent
    if not journal.finished:
        return UNKNOWN, "the run is not finished; go on with it by --resume"
    written = journal.written()
    if not written:
        if base is None:
            return UNKNOWN, "its journal names no checksums; give --base to compare with a replay"
        with tempfile.TemporaryDirectory(prefix="gradless-") as scratch:
            name = next((each for each in ("model.gguf", "model", "adapter") if (folder / each).exists()), "model.gguf")
            replay(base, str(journal.path), str(Path(scratch) / name), quiet=True)
            written = {name: digest for made in Path(scratch).iterdir() for name, digest in checksums(made).items()}
    for name, digest in written.items():
        if not (folder / name).is_file():
            return BAD, f"{folder / name} is missing"
        if checksums(folder / name) != {Path(name).name: digest}:
            return BAD, f"{folder / name} is not what the run wrote"
    return GOOD, ""


def as_text(report: Verdict) -> str:
    """The report as text."""
    ended = "finished" if report["finished"] else "not finished"
    lines = []
    for part, state in (("journal", report["journal"]), ("base", report["base"]), ("tuned", report["tuned"])):
        lines.append(f"  {part:8} {state}" + (f": {report['why'][part]}" if part in report["why"] else ""))
    if report["salvaged"]:
        kept = f"kept {report['steps']} steps in {report['salvaged']}"
        lines.append(f"{kept}: replay it, or put it in the journal's place and go on with --resume")
    elif report["journal"] == GOOD:
        lines.append(f"{report['steps']} steps, {ended}")
    return "\n".join(lines)
