"""The start of a run, or of its resume: the setup, the journal's header, and the check that a resume is of the same run."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import gradless
from gradless import kernels, noise
from gradless.batch import Batch
from gradless.errors import GradlessError
from gradless.formats.model import TunableModel
from gradless.independence import independence
from gradless.journal import Header, Journal
from gradless.methods.base import ZerothOrderOptimizer
from gradless.methods.recipe import Setup
from gradless.methods.registry import MethodOptions, build_method, recipe, setup_of
from gradless.training.batches import is_tokenized, shared_words

JOURNAL = "journal.db"


@dataclass
class RunSetting:
    """A run as its method's recipe sees it; see `recipe.Setting`.

    Attributes:
        model: the model to tune.
        method: the method's name.
        options: `RunOptions`, or a `ZOConfig`.
        seed: the run's seed.
        data: the training rows.
        batch_size: number of rows of a micro-batch.
        batch_of: makes a batch of rows.
    """

    model: TunableModel
    method: str
    options: MethodOptions
    seed: int
    data: Sequence[Any]
    batch_size: int
    batch_of: Callable[[Sequence[Any]], Batch]

    @cached_property
    def answer_words(self) -> int:
        return len(shared_words(self.model.model, self.data))

    def first_batches(self, rows: int | None = None) -> list[Batch]:
        order = noise.permutation(self.seed, 0, len(self.data)).tolist()[: rows or self.batch_size]
        parts = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [self.batch_of([self.data[i] for i in part]) for part in parts]


@dataclass
class Begun:
    """A run that is ready for its first step.

    Attributes:
        setup: how it searches.
        method: the method over the model's spaces. The weights are the base's; a resume still has to replay the journal.
        header: the header of its journal.
    """

    setup: Setup
    method: ZerothOrderOptimizer
    header: Header


def prepare(
    setting: RunSetting,
    config: Header,
    about: Header,
    earlier: Journal | None = None,
    given: ZerothOrderOptimizer | None = None,
) -> Begun:
    """Choose the spaces and how to search them, calibrate, and build the method.

    Args:
        setting: the run.
        config: the configuration that the header keeps beside the method's options.
        about: more entries for the header (plain JSON values).
        earlier: the journal of this run, if it is resumed.
        given: a method that somebody built, in place of the options'.
    """
    if is_tokenized(setting.data):
        independence(setting.model.model)  # tried on the weights that the run began with, even if it is resumed
    before = None
    if earlier is not None:
        before = Setup(earlier.header["method"], earlier.header["groups"], earlier.header.get("eps_factor"))
    setting.model.model.eval()
    if given is not None:
        setup, method = setup_of(given, setting.model), given
    else:
        setup = recipe(setting.method).setup(setting, before)
        method = build_method(setting.model, setup)
    options = {"method", *(field.name for field in fields(MethodOptions))}
    header = {
        "method": setup.method,
        "groups": setup.groups,
        "eps_factor": setup.eps_factor,
        "base": setting.model.fingerprint(),
        "lora": None if setting.model.lora is None else asdict(setting.model.lora),
        "query_shares": [method.distribution(group).share for group in method.param_groups],
        "config": {name: getattr(setting.options, name) for name in sorted(options)}
        | config
        | {"method": setup.method["name"]},
        "environment": environment(torch.device(setting.model.model.device)),
        **about,
    }
    return Begun(setup, method, header)


def check_free(folder: Path) -> None:
    """Refuse a folder that holds a journal.

    Raises:
        GradlessError: it does.
    """
    path = folder / JOURNAL
    if Journal.is_begun(path):
        raise GradlessError(f"{path} exists; resume that run, or choose another output folder.")


def create_journal(folder: Path, header: Header) -> Journal:
    """The journal of a run that begins.

    Raises:
        GradlessError: the folder holds one.
    """
    check_free(folder)
    return Journal.create(folder / JOURNAL, header)


def check_same_run(journal: Journal, header: Header, about: Sequence[str], *, allow_changes: bool) -> None:
    """Refuse to resume a run with another model, data or options, or in another environment.

    Args:
        journal: the journal of the run to resume.
        header: the header that the run would have now.
        about: the names of the entries that only newer journals have.
        allow_changes: whether another environment is accepted.

    Raises:
        GradlessError: see above.
    """
    for part in ("base", "lora", "method", "groups", "config", *about):
        theirs: Any = journal.header.get(part)
        ours: Any = header[part]
        if part in ("config", "options"):  # another version may know more options, or fewer
            theirs, ours = ({name: each[name] for name in theirs.keys() & ours} for each in (theirs, ours))
        if theirs != ours and (part in journal.header or part not in about):
            raise GradlessError(
                f"{journal.path} is another run ({part}: {_difference(theirs, ours)}); "
                "give the same options and data, or a new --output."
            )
    if journal.header["environment"] != header["environment"] and not allow_changes:
        raise GradlessError(
            f"{journal.path} was written in another environment: "
            f"{_difference(journal.header['environment'], header['environment'])}; the bits of later steps may differ. "
            "Add --allow-changes to go on anyway."
        )


def environment(device: torch.device) -> dict[str, object]:
    """The versions and settings on which the bits of a forward on `device` depend."""
    import transformers

    return {
        "gradless": gradless.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kernels": kernels.name(device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def _difference(theirs: object, mine: object) -> str:
    """The first difference between two plain values, in words."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for name in sorted({*theirs, *mine}):
            if theirs.get(name) != mine.get(name):
                return f"{name}: {_difference(theirs.get(name), mine.get(name))}"
    return f"{str(theirs)[:60]} there, {str(mine)[:60]} here"
