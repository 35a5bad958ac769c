"""`ZOTrainer`: transformers' Trainer with zeroth-order steps, a journal instead of checkpoints, and nothing of its loop lost.

    training_step            losses of a micro-batch at +eps and -eps of every direction; nothing is written
    before optimizer.step    the accumulated losses become an estimate, which is committed to the journal
    optimizer.step           applies it

The order of the data is f(seed, epoch), and a resume replays the journal, so no state but the journal is kept.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import speed_metrics

import gradless
from gradless import evaluation, kernels, noise, objectives
from gradless.errors import GradlessError
from gradless.files import Snapshot
from gradless.formats.adapter import AdaptedModel
from gradless.formats.dense import DenseModel
from gradless.independence import independence, keeps_copies
from gradless.journal import Journal
from gradless.layers import QuantLinear
from gradless.methods import METHODS, Estimate, ZerothOrderOptimizer
from gradless.methods.ezo import EZO
from gradless.methods.nzo import NZO, Answers, looked_at
from gradless.methods.quzo import eps_of_share
from gradless.methods.zoqo import mu_of_share
from gradless.nodes import Nodes
from gradless.noise import discretized_gaussian
from gradless.objectives import TokenizedExample
from gradless.targets import Targets
from gradless.training.options import (
    AUTO,
    DEFAULT_GRID,
    DEFAULT_SPAN,
    DEFAULT_STRIDE,
    DEFAULTS,
    FEW_LEVELS,
    INTO_STREAM,
    LAST,
    MEZO_RATIO,
    PAIR_TOKENS,
    RATIO,
    MethodOptions,
    qzo_default,
)
from gradless.training.probe import DIRECTIONS, best_factor

LOOKED_AT = 128
"""Examples from which nzo takes the principal directions of a layer's inputs."""
NAN_STEPS = 5
"""Steps in a row without a finite loss after which a run stops."""


@dataclass
class ZOConfig(MethodOptions, TrainingArguments):  # type: ignore[misc]
    """TrainingArguments and the options of a method. `lr`, where given, is the `learning_rate`."""

    max_grad_norm: float = 0.0
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    save_strategy: str = "no"
    report_to: str | list[str] | None = "none"
    weight_decay: float = 0.0
    learning_rate: float = 5e-5

    def __post_init__(self) -> None:
        self.check()
        if self.lr is None and self.learning_rate != ZOConfig.learning_rate:
            self.lr = self.learning_rate
        if isinstance(self.lr, int | float):
            self.learning_rate = self.lr
        super().__post_init__()
        if self.hold and self.gradient_accumulation_steps > 1:
            raise GradlessError("hold compares a query with the loss at x batch by batch; leave accumulation out with it.")


class SeededSampler(Sampler[int]):
    """Indices in an order that follows from seed and epoch alone."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(noise.permutation(self.seed, self.epoch, self.n).tolist())

    def __len__(self) -> int:
        return self.n


class _Journaling(TrainerCallback):  # type: ignore[misc]
    """Commits a step's estimate before the optimizer applies it."""

    def __init__(self, trainer: ZOTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.commit()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        optimizer = self.trainer.zeroth_order
        if optimizer.moved is not None and self.trainer.journal is not None:
            self.trainer.journal.moved(optimizer.t - 1, optimizer.moved)


class ZOTrainer(Trainer):  # type: ignore[misc]
    """Fine-tune with forward passes only.

    Args:
        model: one that gradless loaded, or any dense `PreTrainedModel`.
        args: a `ZOConfig`; its `output_dir` gets the journal.
        train_dataset: `TokenizedExample`s, or anything a Trainer takes for a model that returns a loss.
        eval_dataset: likewise.
        checkpoint: what gradless loaded the model from; names what can be searched and identifies the base.
        about: more entries for the journal's header (plain JSON values).

    Raises:
        GradlessError: from `train`, when losses stay NaN, or a resume does not fit the journal.
    """

    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        model: Any,
        args: ZOConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        checkpoint: Any = None,
        about: dict[str, Any] | None = None,
        schedule: Callable[[int], float] | None = None,
        **more: Any,
    ) -> None:
        self.checkpoint: Any = checkpoint or DenseModel(model, more.get("processing_class"))
        self.about = about or {}
        self.schedule = schedule
        self.journal: Journal | None = None
        self.allow_changes = False
        self.max_seconds: float | None = None
        self.snapshot: Snapshot | None = None
        self.skipped = 0
        self.last_loss = math.nan
        self._skipped_in_a_row = 0
        self._resuming = False
        self._sums: list[tuple[float, float]] = []
        self._answers: list[Answers] = []
        self._seen: dict[str, Any] | None = None
        self._factor: float | None = None
        self._examples = 0
        self._seconds_before = 0.0
        self._began = 0.0
        if train_dataset is not None and _tokenized(train_dataset):
            more.setdefault("data_collator", self._collate)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **more)
        self.add_callback(_Journaling(self))

    # -- what is searched, and by which method ------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> ZerothOrderOptimizer:
        """The method's optimizer over its spaces."""
        del model
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.checkpoint, self.header_groups(), self.header_method())
            if isinstance(self.optimizer, NZO):
                self.optimizer.nodes = self._nodes(list(self.optimizer.looks))
        return self.zeroth_order

    def header_method(self) -> dict[str, Any]:
        """The method's name and the options that a replay needs."""
        args = self.args
        method = {"name": args.method, "seed": args.seed}
        if args.method == "nzo":
            return method | {"q": args.queries, **self._looked()["method"]}
        if args.method != "ezo":
            method |= {"q": args.queries, "distribution": args.distribution}
        if args.method == "quzo":
            method |= {"roundings": args.roundings, "perturbation_bits": args.perturbation_bits}
        if args.method == "zoqo":
            method |= {"whole_steps": args.whole_steps, "hold": args.hold}
        return method

    def header_groups(self) -> list[dict[str, Any]]:
        """The parameter groups as plain values: kind and names of their tensors, and their options."""
        if self.args.method == "nzo":
            return [self._looked()["group"]]
        groups = self._groups()
        chosen = self.args.eps or self.args.unquantized_eps or not any(group.get("auto") for group in groups)
        factor = 1.0 if chosen else self._probed(groups)
        return [{**group, "eps": factor * group["eps"]} for group in groups]

    def _groups(self) -> list[dict[str, Any]]:
        args = self.args
        match args.method:
            case "mezo" if self.checkpoint.quantized:
                missing = "mezo tunes a GGUF's float tensors, and this has none"
                return [self._group("floats", "mezo, floats of a GGUF", missing)]
            case "mezo":
                return [{**self._group("parameters", "mezo", "this model has no linear layer"), "master": args.master}]
            case "quzo" | "zoqo":
                return self._code_groups()
        groups = self._block_groups()
        if args.train_unquantized:
            lr, eps = DEFAULTS["mezo, floats of a GGUF"]
            vectors = self._group("floats", "qzo", "this model has no unquantized vector", names="vectors")
            if args.unquantized_lr or "auto" not in vectors:
                vectors.pop("auto", None)
                vectors["lr"] = args.unquantized_lr or lr
            groups.append({**vectors, "eps": args.unquantized_eps or eps, "weight_decay": 0.0, "clip": args.clip})
        return groups

    def _probed(self, groups: list[dict[str, Any]]) -> float:
        """By what to multiply the groups' eps, as the first rows say; of a resumed run, what they said then."""
        if self._factor is None and self.journal is not None:
            self._factor = self.journal.header.get("eps_factor", 1.0)
        if self._factor is None:
            method = build_optimizer(self.checkpoint, groups, self.header_method())
            method.q = 1 if isinstance(method, EZO) else DIRECTIONS
            inputs = self._prepare_inputs(self.data_collator(self._first_rows(self.args.per_device_train_batch_size)))
            self.model.eval()

            def derivatives(factor: float) -> torch.Tensor:
                for group, given in zip(method.param_groups, groups, strict=True):
                    group["eps"] = factor * given["eps"]
                losses = self._query(method, self.model, inputs)
                return torch.tensor([float(plus - minus) / (2 * factor) for plus, minus in losses])

            with torch.inference_mode():
                self._factor = best_factor(derivatives)
        return self._factor

    def _first_rows(self, n: int) -> list[Any]:
        """The first rows that are trained on."""
        order = noise.permutation(self.args.seed, 0, len(self.train_dataset)).tolist()
        return [self.train_dataset[i] for i in order[:n]]

    def _looked(self) -> dict[str, Any]:
        """What nzo sees of model and data before its first step, as the header keeps it; of a resumed run, what it saw then."""
        if self._seen is None:
            header = {} if self.journal is None else self.journal.header
            if header.get("method", {}).get("name") == "nzo":
                method = {name: header["method"][name] for name in ("words", "looks")}
                self._seen = {"group": header["groups"][0], "method": method}
            else:
                self._seen = self._look()
        return self._seen

    def _look(self) -> dict[str, Any]:
        args, size = self.args, self.args.per_device_train_batch_size
        words = len(shared_words(self.model, self.train_dataset))
        if not words:
            raise GradlessError(
                "nzo asks for one of a few words, the same for all rows, each a single token, of a model that keeps "
                "copies of a token apart; use --method ezo or qzo."
            )
        missing = "nzo tunes the scales of quantized weights, and this model has none; use --method mezo, or a GGUF"
        target = _last_layers(self.model.config.get_text_config().num_hidden_layers) if self.checkpoint.quantized else None
        group = {**self._group("blocks", "nzo", missing, target=target), "part": args.part or "both", "relative": True}
        spaces = self.checkpoint.spaces(**{name: group[name] for name in ("kind", "names", "part", "relative")})
        rows, asked = self._first_rows(LOOKED_AT), []
        for start in range(0, len(rows), size):
            batch = self._prepare_inputs(self._collate(rows[start : start + size]))
            asked.append((partial(objectives.asked, self.model, batch), objectives.asked_tokens(batch)))
        slopes = {space.name: space.mean_square_slope() for space in spaces}
        with torch.inference_mode():
            looks = looked_at(self._nodes(group["names"]), slopes, asked, args.queries, args.seed)
        return {"group": group, "method": {"words": words, "looks": {name: look.to_json() for name, look in looks.items()}}}

    def _nodes(self, names: Sequence[str]) -> Nodes:
        """The layers that multiply the named tensors."""
        layers = {m.packed.name: m for m in self.model.modules() if isinstance(m, QuantLinear)}
        return Nodes({name: layers[name] for name in names})

    def _block_groups(self) -> list[dict[str, Any]]:
        """A group for each kind of block, where the user leaves lr or eps to us."""
        args, checkpoint = self.args, self.checkpoint
        missing = f"{args.method} tunes the scales of quantized weights, and this model has none; use --method mezo, or a GGUF"
        by_default: dict[str, list[str]] = {}
        for name in self._group("blocks", args.method, missing)["names"]:
            if args.method == "ezo":
                default = "ezo" if checkpoint.has_offset(name) else "ezo, scales"
            else:
                default = "qzo, absolute" if args.absolute else qzo_default(checkpoint.is_centred(name))
            by_default.setdefault(default, []).append(name)
        own = {"part": "offset"} if args.method == "ezo" else {"part": args.part or "scale", "clip": args.clip}
        space = {**own, "relative": not args.absolute}
        return [{**self._group("blocks", default, missing), "names": names, **space} for default, names in by_default.items()]

    def _code_groups(self) -> list[dict[str, Any]]:
        """A group for each length of grid. Defaults reach as far along a long grid as along a short one; what a user gives is
        in grid steps, or, where it is absolute, in units of the weights."""
        args, adapted = self.args, isinstance(self.checkpoint, AdaptedModel)
        missing = f"{args.method} tunes integer codes, and this model has none; quantize it first (--bits 8), or give --lora 8"
        by_length: dict[float, list[str]] = {}
        for name in self._group("codes", args.method, missing)["names"]:
            by_length.setdefault(self.checkpoint.grid_length(name), []).append(name)
        space = {"clamp": args.clamp, "residual": not (args.stateless or args.whole_steps)}
        if not adapted:
            space["stride"] = args.stride or DEFAULT_STRIDE
        power = 2 if args.method == "quzo" else 1  # QuZO's update is in steps, and so is what its gradient is taken by
        groups = []
        for length, names in by_length.items():
            few = length < FEW_LEVELS and not adapted
            group = self._group("codes", args.method + (", lora" * adapted or ", few levels" * few), missing)
            space["span"] = args.span or (DEFAULT_SPAN if few else 1)
            unit = 1 / statistics.mean(map(self.checkpoint.step_size, names)) if args.absolute else length / DEFAULT_GRID
            eps = group["eps"] * (unit if args.absolute or not (args.eps or args.share) else 1)
            if args.method == "zoqo" and eps < group["eps"] < 1:  # there mu is no standard deviation: the share's root is
                eps = mu_of_share(discretized_gaussian(1, group["eps"]).share * unit**2)
            lr = group["lr"] * (unit**power if args.absolute or args.lr is None else 1)
            groups.append({**group, "names": names, "lr": lr, "eps": eps, **space})
        return groups

    def _group(
        self, kind: str, default: str, missing: str, *, names: str | None = None, target: str | None = None
    ) -> dict[str, Any]:
        """One group over all tunable tensors of a kind, or, where the user names no modules, over those of `target`."""
        args = self.args
        tunable = self.checkpoint.tunable(names or kind, Targets(args.target_modules or target, args.exclude_modules))
        if not tunable:
            raise GradlessError(f"{missing}.")
        lr, eps = DEFAULTS[default]
        if args.share is not None:
            eps = eps_of_share(args.share) if args.method == "quzo" else mu_of_share(args.share)
        options = {"lr": lr if args.lr is None else args.lr, "eps": args.eps or eps, "weight_decay": args.weight_decay}
        if args.lr == "auto" or (args.lr is None and (default in AUTO or args.ratio is not None)):
            options |= {"lr": args.ratio or (MEZO_RATIO if args.method == "mezo" else RATIO), "auto": True}
        elif args.method == "ezo":
            options["auto"] = False
        return {"kind": kind, "names": tunable, **options}

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The given schedule of lr factors, or the Trainer's own."""
        if self.schedule is not None and self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.schedule)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # -- a step -------------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Losses of one micro-batch under each of the step's directions, added to the step's sums; their mean."""
        del num_items_in_batch
        model.eval()
        inputs = self._prepare_inputs(inputs)
        with torch.inference_mode():
            losses: list[tuple[Any, Any]]
            match self.zeroth_order:
                case NZO() as method:
                    losses = self._ask(method, model, inputs)
                case EZO() as method:
                    losses = self._query(method, model, inputs, first=len(self._sums))
                    self._sums, self._examples = self._sums + losses, 1
                case method:
                    losses = self._query(method, model, inputs)
                    self._add(losses, len(inputs["sizes"]) if "sizes" in inputs else 1)
        share = 1 / self.current_gradient_accumulation_steps
        return torch.tensor(share * sum(map(sum, losses)) / (2 * len(losses)), device=self.args.device)

    def _ask(self, method: NZO, model: Any, inputs: Any) -> list[tuple[float, float]]:
        """What a micro-batch answers to nzo's queries, behind those before; the mean loss at either side of them."""
        first = sum(len(each.responses) for each in self._answers)
        scores = partial(objectives.asked, model, inputs)
        self._answers.append(method.ask(scores, inputs["labels"], objectives.asked_tokens(inputs), first))
        up, down = self._answers[-1].losses
        return [(up / len(inputs["sizes"]), down / len(inputs["sizes"]))]

    def _query(self, method: ZerothOrderOptimizer, model: Any, inputs: Any, first: int = 0) -> list[tuple[Any, Any]]:
        """(loss at +eps, loss at -eps) of a micro-batch along each direction; of ezo, of each of its examples, from the
        direction `first` on."""
        if not isinstance(method, EZO):
            return method.query(lambda: self.compute_loss(model, inputs), self._pair(model, inputs))
        if not (self._computes_losses(inputs) and independence(model).halves):
            raise GradlessError(
                f"{self.args.method} needs to know which tokens are whose: rows that gradless tokenized, its own loss, and a "
                "model whose layers all see a batch's tokens in their order; use --method qzo."
            )
        pair = self._pair(model, inputs, mean=False)
        return method.query(lambda: objectives.losses(model, inputs)[0], pair, owners=inputs["owners"], first=first)

    def _add(self, losses: list[tuple[Any, Any]], examples: int) -> None:
        """Add a micro-batch's losses to the step's."""
        before = self._sums or [(0.0, 0.0)] * len(losses)
        self._sums = [(p + examples * plus, m + examples * minus) for (p, m), (plus, minus) in zip(before, losses, strict=True)]
        self._examples += examples

    def _computes_losses(self, inputs: Any) -> bool:
        """Whether a batch is one of `TokenizedExample`s, with the loss that is ours."""
        return type(self).compute_loss is ZOTrainer.compute_loss and isinstance(inputs, dict) and "sizes" in inputs

    def _pair(self, model: Any, inputs: Any, *, mean: bool = True) -> Callable[[], Any] | None:
        """The losses of a batch and its copy, in one forward; None where two forwards are to be made."""
        if not (self._computes_losses(inputs) and independence(model).halves) or inputs["input_ids"].numel() > PAIR_TOKENS:
            return None

        def both() -> Any:
            losses = objectives.losses(model, objectives.doubled(inputs))[0].view(2, -1)
            return losses.mean(1) if mean else losses

        return both

    def commit(self) -> None:
        """Turn the step's losses into its estimate and write it to the journal; the optimizer's next step applies it."""
        optimizer = self.zeroth_order
        assert self.journal is not None
        if isinstance(optimizer, NZO):
            estimate = optimizer.estimate_of_answers(self._answers)
        else:
            estimate = optimizer.estimate_of([(plus / self._examples, minus / self._examples) for plus, minus in self._sums])
        self._sums, self._examples, self._answers = [], 0, []
        if self.snapshot is not None:
            self.snapshot.check()
        self.journal.append(estimate, self.seconds)
        optimizer.pending = estimate
        self.last_loss = estimate.loss
        self._count(estimate)
        if self._skipped_in_a_row >= NAN_STEPS:
            raise GradlessError(
                f"the loss was not finite in {NAN_STEPS} steps in a row (up to step {estimate.step}); the model diverged: "
                "start again with a smaller --lr or --eps."
            )

    def _count(self, estimate: Estimate) -> None:
        self.skipped += not estimate.finite
        self._skipped_in_a_row = 0 if estimate.finite else self._skipped_in_a_row + 1

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The mean loss of a batch of `TokenizedExample`s; any other batch goes to the model."""
        if isinstance(inputs, dict) and "sizes" in inputs:
            return objectives.losses(model, inputs)[0].mean()
        return super().compute_loss(model, inputs, *args, **kwargs)

    @property
    def zeroth_order(self) -> ZerothOrderOptimizer:
        """The optimizer itself, without accelerate's wrapper."""
        optimizer: ZerothOrderOptimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer

    @property
    def seconds(self) -> float:
        """The run's time so far, pauses left out."""
        return self._seconds_before + time.perf_counter() - self._began

    @property
    def out_of_time(self) -> bool:
        """Whether `max_seconds` are over."""
        return self.max_seconds is not None and self.seconds >= self.max_seconds

    # -- the run ------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **more: Any) -> Any:
        """Run, or resume the journal in `output_dir` (or in the folder that `resume_from_checkpoint` names)."""
        if self.args.world_size > 1:
            raise GradlessError("ZOTrainer runs in one process; there are no gradients to share between several.")
        if _tokenized(self.train_dataset):
            independence(self.model)  # tried on the weights that the run began with, a resumed one's too
        self._began = time.perf_counter()
        self._resuming = bool(resume_from_checkpoint)
        folder = Path(resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else self.args.output_dir)
        path = folder / "journal.db"
        if self._resuming:
            self.journal = Journal.open(path, to_go_on=True)
            self._check_resume(self.journal)
            self._seconds_before = self.journal.seconds
        elif self.journal is None:
            self.begin()
        return super().train(**more)

    def begin(self) -> None:
        """Create the journal in `output_dir`; `train` does so where nobody did."""
        path = Path(self.args.output_dir) / "journal.db"
        if Journal.is_begun(path):
            raise GradlessError(f"{path} exists; resume that run, or choose another output folder.")
        self.journal = Journal.create(path, self.header())

    def header(self) -> dict[str, Any]:
        """What the run is, as the journal keeps it."""
        options = {field.name for field in fields(MethodOptions)}
        optimizer = self.create_optimizer()
        return {
            "method": self.header_method(),
            "groups": self.header_groups(),
            "eps_factor": self._factor,
            "base": self.checkpoint.fingerprint(),
            "lora": asdict(self.checkpoint.lora) if isinstance(self.checkpoint, AdaptedModel) else None,
            "query_shares": [optimizer.distribution(group).share for group in optimizer.param_groups],
            "config": {
                **{name: value for name, value in asdict(self.args).items() if name in options},
                "batch_size": self.args.per_device_train_batch_size,
                "accumulate": self.args.gradient_accumulation_steps,
                "steps": self.args.max_steps,
                "epochs": self.args.num_train_epochs,
                "schedule": "given" if self.schedule else str(self.args.lr_scheduler_type),
                "seed": self.args.seed,
            },
            "environment": environment(self.args.device),
            **self.about,
        }

    def _check_resume(self, journal: Journal) -> None:
        mine = self.header()
        for part in ("base", "lora", "method", "groups", "config", *self.about):
            theirs: Any = journal.header.get(part)
            ours: Any = mine[part]
            if part in ("config", "options"):  # another version may know more options, or fewer
                theirs, ours = ({name: each[name] for name in theirs.keys() & ours} for each in (theirs, ours))
            if theirs != ours and (part in journal.header or part not in self.about):
                raise GradlessError(
                    f"{journal.path} is another run ({part}: {_difference(theirs, ours)}); "
                    "give the same options and data, or a new --output."
                )
        if journal.header["environment"] != mine["environment"] and not self.allow_changes:
            raise GradlessError(
                f"{journal.path} was written elsewhere: its environment "
                f"{_difference(journal.header['environment'], mine['environment'])}; the bits of later steps may differ. "
                "Add --allow-changes to go on all the same."
            )

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self._resuming:
            kwargs["resume_from_checkpoint"] = self.args.output_dir
        return super()._inner_training_loop(*args, **kwargs)

    def _init_training_state(self, max_steps: int, steps_per_epoch: int, epochs: int, _resume: Any, trial: Any) -> Any:
        super()._init_training_state(max_steps, steps_per_epoch, epochs, None, trial)
        if self._resuming:
            assert self.journal is not None
            self.state.global_step = self.journal.steps
            if self.state.global_step >= max_steps or self.out_of_time:
                return epochs, 0  # nothing is left to do: the Trainer itself looks only after a step
        done, rest = divmod(self.state.global_step, steps_per_epoch)
        return done, rest * self.args.gradient_accumulation_steps

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        """Bring weights, step and schedule to where the journal ends."""
        del checkpoint
        assert self.journal is not None
        self.optimizer._opt_called = True  # torch warns of a scheduler that runs ahead of its optimizer
        for written in self.zeroth_order.replay(self.journal.estimates()):
            for estimate in written:
                self._count(estimate)
                self._began = time.perf_counter()  # the schedule may follow the clock, which a replay does not count on
                self.lr_scheduler.step()
        self._began = time.perf_counter()

    def _load_rng_state(self, checkpoint: Any) -> None:
        """Nothing here draws from a global generator."""

    def _load_scaler(self, checkpoint: Any) -> None:
        """There is no gradient to scale."""

    def _save_checkpoint(self, *_: Any, **__: Any) -> None:
        """Every step is in the journal already."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the tuned model, in the format it came in, to `output_dir`."""
        del _internal_call
        target = Path(output_dir or self.args.output_dir) / self.checkpoint.output_name
        self.checkpoint.save(target, self.zeroth_order.spaces)

    def _wrap_model(self, model: Any, *_: Any, **__: Any) -> Any:
        """Never wrapped: there are no gradients."""
        return model

    def _get_grad_norm(self, *_: Any, **__: Any) -> None:
        """There are no gradients."""

    def floating_point_ops(self, *_: Any) -> int:
        """Not counted: it walks over all parameters in every step."""
        return 0

    # -- data and evaluation ------------------------------------------------------------------------------------------

    def _collate(self, examples: Sequence[TokenizedExample]) -> dict[str, Any]:
        copies = 2 * self.args.queries if self.args.method == "nzo" else 0
        return objectives.collate(examples, rows=independence(self.model).rows, copies=copies)

    def _get_train_sampler(self, train_dataset: Any = None) -> SeededSampler:
        return SeededSampler(len(train_dataset if train_dataset is not None else self.train_dataset), self.args.seed)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss, accuracy and F1 of `TokenizedExample`s; any other data set as the Trainer does it."""
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        if not _tokenized(data):
            metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return metrics
        began = time.time()
        measured = evaluation.evaluate(self.model, data, self.processing_class, batch_size=self.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        metrics |= speed_metrics(metric_key_prefix, began, num_samples=len(data))
        if self.journal is not None and self.is_in_train:
            self.journal.evaluated(self.state.global_step, measured, self.seconds)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


SPACE_OPTIONS = ("kind", "names", "part", "relative", "master", "clamp", "residual", "stride")
"""What a parameter group says of its spaces, not of the method."""


def build_optimizer(source: Any, groups: list[dict[str, Any]], method: dict[str, Any]) -> ZerothOrderOptimizer:
    """A method's optimizer over the spaces of `source`, from the plain values that a journal's header keeps."""
    made = []
    for group in groups:
        options = {name: value for name, value in group.items() if name not in SPACE_OPTIONS}
        made.append({**options, "spaces": source.spaces(**{k: v for k, v in group.items() if k not in options})})
    name, rest = method["name"], {k: v for k, v in method.items() if k != "name"}
    return METHODS[name](made, **rest)


def environment(device: torch.device) -> dict[str, Any]:
    """What the bits of a forward on `device` depend on."""
    import transformers

    return {
        "gradless": gradless.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kernels": kernels.name(device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def shared_words(model: Any, data: Any) -> tuple[int, ...]:
    """The token ids of the words among which all rows choose, of a model that takes copies of a token; () if there are none."""
    words = {example.words for example in data} if _tokenized(data) else set()
    shared = (words.pop() or ()) if len(words) == 1 else ()
    return shared if shared and keeps_copies(model) else ()


def _last_layers(layers: int) -> str:
    """The paths of the modules that nzo tunes, as a regular expression."""
    last = range(math.floor(layers * (1 - LAST)), layers)
    return rf".*\.({'|'.join(map(str, last))})\..*\.({'|'.join(INTO_STREAM)})"


def _tokenized(data: Any) -> bool:
    return isinstance(data, Sequence) and len(data) > 0 and isinstance(data[0], TokenizedExample)


def _difference(theirs: Any, mine: Any) -> str:
    """Where two plain values differ first, and how."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for name in sorted({*theirs, *mine}):
            if theirs.get(name) != mine.get(name):
                return f"{name}: {_difference(theirs.get(name), mine.get(name))}"
    return f"{str(theirs)[:60]} there, {str(mine)[:60]} here"
