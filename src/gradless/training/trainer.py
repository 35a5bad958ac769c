"""`ZOTrainer`: transformers' Trainer around the same `Stepper` that `gradless tune` uses.

    training_step            measures a micro-batch; nothing is written
    before optimizer.step    the step's estimate is committed to the journal
    optimizer.step           applies it

The order of the data is f(seed, epoch), and a resume replays the journal, so the journal is the only state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_utils import EvalPrediction, denumpify_detensorize, speed_metrics

from gradless import evaluation, objectives
from gradless.batch import Batch, Closure
from gradless.errors import GradlessError
from gradless.flags import check_values, option
from gradless.formats.dense import DenseModel
from gradless.formats.model import TunableModel
from gradless.journal import Journal
from gradless.methods.base import ZerothOrderOptimizer
from gradless.methods.registry import DEFAULT, RECIPES, MethodOptions, check_options, recipe
from gradless.objectives import TokenInputs, TokenizedExample
from gradless.training.batches import SeededSampler, TokenBatch, is_tokenized, token_batch
from gradless.training.start import JOURNAL, Begun, RunSetting, check_free, check_same_run, create_journal, prepare
from gradless.training.stepper import Clock, Stepper
from gradless.types import LanguageModel, Tokenizer


@dataclass
class ZOConfig(MethodOptions, TrainingArguments):  # type: ignore[misc]
    """TrainingArguments and the options of a method. `lr`, if given, replaces `learning_rate`."""

    method: str = option(DEFAULT, "How to search.", choices=RECIPES)
    max_grad_norm: float = 0.0
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    save_strategy: str = "no"
    report_to: str | list[str] | None = "none"
    weight_decay: float = 0.0
    learning_rate: float = 5e-5

    def __post_init__(self) -> None:
        check_values(self, fields(MethodOptions))
        check_options(self, self.method)
        if self.lr is None and self.learning_rate != ZOConfig.learning_rate:
            self.lr = self.learning_rate
        if isinstance(self.lr, int | float):
            self.learning_rate = self.lr
        super().__post_init__()

    @property
    def accumulate(self) -> int:
        """Micro-batches of a step."""
        return int(self.gradient_accumulation_steps)


class _Journaling(TrainerCallback):  # type: ignore[misc]
    """Commits a step's estimate before the optimizer applies it."""

    def __init__(self, trainer: ZOTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        self.trainer.stepper.commit()

    def on_optimizer_step(self, *_: object, **__: object) -> None:
        self.trainer.stepper.note_moves()

    def on_step_end(self, args: TrainingArguments, state: object, control: TrainerControl, **_: object) -> None:
        del args, state
        control.should_training_stop |= self.trainer.clock.is_over


class ZOTrainer(Trainer):  # type: ignore[misc]
    """Fine-tune with forward passes only.

    Args:
        model: one that gradless loaded, or any dense `PreTrainedModel`.
        args: a `ZOConfig`; its `output_dir` gets the journal.
        train_dataset: `TokenizedExample`s, or anything a Trainer takes for a model that returns a loss.
        eval_dataset: likewise.
        checkpoint: what gradless loaded, which names the tunable tensors and identifies the base; None for a dense model.
        about: more entries for the journal's header (plain JSON values).
        schedule: a step's number -> the factor of lr; None for the Trainer's own schedule.

    Attributes:
        allow_changes: resume although versions, kernels or threads differ.
        clock: the run's clock, whose limit ends the run.

    Raises:
        GradlessError: from `train`, if losses are not finite for too many steps, or a resume does not fit the journal.
    """

    optimizer: Any  # accelerate wraps it, and the schedule
    lr_scheduler: Any
    control: TrainerControl

    def __init__(
        self,
        model: LanguageModel,
        args: ZOConfig,
        train_dataset: object = None,
        eval_dataset: object = None,
        *,
        checkpoint: TunableModel | None = None,
        about: dict[str, object] | None = None,
        schedule: Callable[[int], float] | None = None,
        processing_class: Tokenizer | None = None,
        **more: object,
    ) -> None:
        self.checkpoint: TunableModel = checkpoint or DenseModel(model, processing_class)
        self.about = about or {}
        self.schedule = schedule
        self.allow_changes = False
        self.clock = Clock()
        self._begun: Begun | None = None
        self._stepper: Stepper | None = None
        self._earlier: Journal | None = None
        if is_tokenized(train_dataset):
            more.setdefault("data_collator", self._collate)
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=processing_class, **more
        )
        self.add_callback(_Journaling(self))

    # -- what is searched, and by which method ------------------------------------------------------------------------

    @property
    def begun(self) -> Begun:
        """The run, ready for its first step; prepared at the first call."""
        if self._begun is None:
            args = self.args
            size = args.per_device_train_batch_size
            setting = RunSetting(self.checkpoint, args.method, args, args.seed, self.train_dataset, size, self._batch_of)
            config = {
                "batch_size": size,
                "accumulate": args.gradient_accumulation_steps,
                "steps": args.max_steps,
                "epochs": args.num_train_epochs,
                "schedule": "given" if self.schedule else str(args.lr_scheduler_type),
                "seed": args.seed,
            }
            self._begun = prepare(setting, config, self.about, self._earlier, self.optimizer and self.zeroth_order)
        return self._begun

    def create_optimizer(self, model: object = None) -> ZerothOrderOptimizer:
        """The method over its spaces, unless an optimizer was given as `optimizers=`."""
        del model
        if self.optimizer is None:
            self.optimizer = self.begun.method
        return self.zeroth_order

    @property
    def zeroth_order(self) -> ZerothOrderOptimizer:
        """The optimizer itself, without accelerate's wrapper."""
        optimizer: ZerothOrderOptimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer

    @property
    def stepper(self) -> Stepper:
        """The steps of the run, which has begun."""
        assert self._stepper is not None, "train() begins the run"
        return self._stepper

    @property
    def journal(self) -> Journal:
        """The journal of the run, which has begun."""
        return self.stepper.journal

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> object:
        """The given schedule of lr factors, or the Trainer's own."""
        if self.schedule is not None and self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.schedule)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # -- a step -------------------------------------------------------------------------------------------------------

    def training_step(self, model: LanguageModel, inputs: object, num_items_in_batch: object = None) -> torch.Tensor:
        """Measure one micro-batch along each of the step's directions; returns its share of the step's mean loss."""
        del num_items_in_batch
        model.eval()
        measurement = self.stepper.measure(self._batch(self._prepare_inputs(inputs)))
        return torch.tensor(measurement.loss / self.current_gradient_accumulation_steps, device=self.args.device)

    def _batch(self, inputs: object) -> Batch:
        """A batch of `TokenizedExample`s, or one that has a loss and nothing else."""
        ours = _token_inputs(inputs)
        if ours is not None and type(self).compute_loss is ZOTrainer.compute_loss:
            return TokenBatch(self.model, ours)
        batch = Closure(lambda: self.compute_loss(self.model, inputs))
        batch.size = 1 if ours is None else len(ours.sizes)
        return batch

    def _batch_of(self, rows: Sequence[object]) -> Batch:
        return self._batch(self._prepare_inputs(self.data_collator(rows)))

    def compute_loss(self, model: LanguageModel, inputs: object, *args: object, **kwargs: object) -> object:
        """The mean loss of a batch of `TokenizedExample`s; any other batch goes to the model."""
        ours = _token_inputs(inputs)
        if ours is not None:
            return objectives.losses(model, ours)[0].mean()
        return super().compute_loss(model, inputs, *args, **kwargs)

    # -- the run ------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **more: object) -> object:
        """Run, or resume the journal in `output_dir` (or in the folder that `resume_from_checkpoint` names)."""
        if self.args.world_size > 1:
            raise GradlessError("ZOTrainer runs in one process; there are no gradients to share between several.")
        folder = Path(resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else self.args.output_dir)
        journal = self._opened(folder) if resume_from_checkpoint else self._created(folder)
        self._stepper = Stepper(self.create_optimizer(), journal, self.clock)
        return super().train(**more)

    def _created(self, folder: Path) -> Journal:
        """The journal of a run that begins now."""
        check_free(folder)
        self._earlier = None
        journal = create_journal(folder, self.begun.header)
        self.clock.start()
        return journal

    def _opened(self, folder: Path) -> Journal:
        """The journal of a run that goes on, with a model that is where the base was."""
        if self._begun is not None and self._begun.method.t:
            raise GradlessError("this trainer's model was tuned already, and a resume begins with the base: build both anew.")
        journal = self._earlier = Journal.open(folder / JOURNAL, to_go_on=True)
        try:
            self.check_same_run(journal)
        except GradlessError:
            self._earlier = self._begun = None
            raise
        self.clock = Clock(journal.seconds, self.clock.limit)
        return journal

    def check_same_run(self, journal: Journal) -> None:
        """Refuse to resume another run; see `start.check_same_run`."""
        check_same_run(journal, self.begun.header, list(self.about), allow_changes=self.allow_changes)

    # A resume takes the journal where the Trainer takes a checkpoint's folder.

    def _inner_training_loop(self, *args: object, **kwargs: object) -> object:
        if self._earlier is not None:
            kwargs["resume_from_checkpoint"] = self.args.output_dir
        return super()._inner_training_loop(*args, **kwargs)

    def _init_training_state(self, max_steps: int, steps_per_epoch: int, epochs: int, _resume: object, trial: object) -> object:
        super()._init_training_state(max_steps, steps_per_epoch, epochs, None, trial)
        if self._earlier is not None:
            self.state.global_step = self._earlier.steps
            if self.state.global_step >= max_steps or self.clock.is_over:
                return epochs, 0  # nothing is left to do; the Trainer itself would notice only after a step
        done, rest = divmod(self.state.global_step, steps_per_epoch)
        return done, rest * self.args.gradient_accumulation_steps

    def _load_optimizer_and_scheduler(self, checkpoint: object) -> None:
        """Bring weights, step and schedule to the end of the journal."""
        del checkpoint
        self.optimizer._opt_called = True  # torch warns of a scheduler that runs ahead of its optimizer
        for _ in self.stepper.replay():
            self.clock.start()  # a schedule may follow the clock, on which a replay does not count
            self.lr_scheduler.step()

    def _save_checkpoint(self, *_: object, **__: object) -> None:
        """Every step is in the journal already."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the tuned model, in the format of its base, to `output_dir`."""
        del _internal_call
        target = Path(output_dir or self.args.output_dir) / self.checkpoint.output_name
        self.checkpoint.save(target)

    def _wrap_model(self, model: LanguageModel, *_: object, **__: object) -> object:
        """The model itself: there are no gradients to share."""
        return model

    def _get_grad_norm(self, *_: object, **__: object) -> None:
        """There are no gradients."""

    def floating_point_ops(self, *_: object) -> int:
        """0: the Trainer's count would walk over all parameters in every step."""
        return 0

    # -- data and evaluation ------------------------------------------------------------------------------------------

    def _collate(self, examples: Sequence[TokenizedExample]) -> dict[str, object]:
        copies = recipe(self.args.method).copies(self.args) if self.optimizer is None else self.zeroth_order.copies
        return vars(token_batch(self.model, examples, copies).inputs)

    def _get_train_sampler(self, train_dataset: Sized | None = None) -> SeededSampler:
        return SeededSampler(len(train_dataset if train_dataset is not None else self.train_dataset), self.args.seed)

    def evaluate(
        self, eval_dataset: object = None, ignore_keys: object = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, accuracy and F1 of `TokenizedExample`s, and the result of `compute_metrics` on their candidates' scores. Any
        other data set is left to the Trainer."""
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(data, str):  # one of several, which the Trainer names
            data = self.eval_dataset[data]
        if not is_tokenized(data):
            metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return metrics
        began = time.time()
        scores: list[tuple[Tensor, int]] = []
        measured = evaluation.evaluate(
            self.model,
            data,
            self.processing_class,
            batch_size=self.args.per_device_eval_batch_size,
            scored=lambda score, label: scores.append((score.cpu(), label)),
        )
        if self.compute_metrics is not None:
            measured |= denumpify_detensorize(self.compute_metrics(_prediction(scores)))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        metrics |= speed_metrics(metric_key_prefix, began, num_samples=len(data))
        if self.is_in_train:
            self.journal.evaluated(self.state.global_step, measured, self.clock.seconds)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _token_inputs(inputs: object) -> TokenInputs | None:
    """A batch that `ZOTrainer._collate` made, which transformers passes on as a dictionary; None if it is another one."""
    return TokenInputs(**inputs) if isinstance(inputs, dict) and "sizes" in inputs else None


def _prediction(scores: list[tuple[Tensor, int]]) -> EvalPrediction:
    """The candidates' scores, (examples, most candidates), with -inf if an example has fewer, and the right candidates; in the
    order of evaluation, which is by length."""
    padded = pad_sequence([score for score, _ in scores], batch_first=True, padding_value=-torch.inf)
    return EvalPrediction(predictions=padded.numpy(), label_ids=torch.tensor([label for _, label in scores]).numpy())
