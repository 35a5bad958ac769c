"""ZOTrainer: a run, its resume to the bit, accumulation, any dense model, NaN."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from gradless import EZO, QZO, ZOQO, QuZO, codes, noise, objectives, offsets, replay, scales
from gradless.errors import GradlessError
from gradless.formats.adapter import AdaptedModel, LoRA
from gradless.formats.gguf_model import load_gguf
from gradless.independence import independence
from gradless.journal import Journal
from gradless.methods.probe import FACTORS
from gradless.methods.registry import setup_of
from gradless.objectives import Example, tokenize
from gradless.training import batches
from gradless.training.batches import SeededSampler
from gradless.training.stepper import Stepper
from gradless.training.trainer import ZOConfig, ZOTrainer
from tests.tiny import tiny_gguf


def examples(tokenizer, n=20, *, words=("no", "yes"), end=""):
    made = [Example(f"{'az'[i % 2] * 3} word {i}{end}", words, i % 2) for i in range(n)]
    return [tokenize(example, tokenizer, context=128) for example in made]


def trainer(path, output, *, lora=None, **options):
    loaded = load_gguf(path) if lora is None else AdaptedModel(load_gguf(path), LoRA(lora))
    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    config = ZOConfig(output_dir=str(output), **{**defaults, **options})
    of_one_token = {"words": ("n", "y"), "end": "\n"} if config.method == "nzo" else {}
    rows = examples(loaded.tokenizer, **of_one_token)
    return ZOTrainer(loaded.model, config, rows, checkpoint=loaded, processing_class=loaded.tokenizer)


def no_losses(_model, batch):
    return torch.full((len(batch.sizes),), float("nan")), None


def masters(zo):
    return [space.values.clone() for space in zo.zeroth_order.spaces]


def test_a_run_journals_every_step_and_moves_the_weights(tiny, tmp_path):
    zo = trainer(tiny, tmp_path)
    zo.train()
    assert zo.journal.steps == zo.state.global_step == 6
    base = load_gguf(tiny).file.quantized
    for space in zo.zeroth_order.spaces:
        tensor = base[space.name]
        assert not torch.equal(space.values, tensor.block.field(tensor.packed, tensor.block.scale_at))
    rates = [estimate.lr[0] for estimate in zo.journal.estimates()]
    assert rates == pytest.approx([4e-4 * (1 - step / 6) for step in range(6)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q": 2},
        {"gradient_accumulation_steps": 2},
        {"train_unquantized": True},
        {"method": "nzo"},
        {"method": "nzo", "gradient_accumulation_steps": 2, "q": 2, "target_modules": "o_proj"},
        {"method": "ezo"},
        {"method": "ezo", "gradient_accumulation_steps": 2, "lr": 1e-3},
        {"lr": "auto", "ratio": 0.1, "q": 2},
        {"method": "quzo", "eps": 0.3, "lr": 1e-2, "q": 2},
        {"method": "zoqo", "lr": 0.5},
        {"method": "zoqo", "lr": 0.5, "stateless": True, "stride": 1},
        {"method": "quzo", "lora": 4},
        {"method": "zoqo", "lora": 4, "q": 2},
    ],
)
def test_a_resume_gives_the_bits_of_the_uninterrupted_run(tiny, tmp_path, monkeypatch, options):
    whole = trainer(tiny, tmp_path / "whole", **options)
    whole.train()

    cut = trainer(tiny, tmp_path / "cut", **options)
    original = Stepper.commit

    def commit_and_die(self):
        estimate = original(self)  # the step is in the journal; the process dies before it is applied
        if self.journal.steps == 4:
            raise SystemExit
        return estimate

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "commit", commit_and_die)
        with pytest.raises(SystemExit):
            cut.train()

    again = trainer(tiny, tmp_path / "cut", **options)
    again.train(resume_from_checkpoint=True)
    assert list(again.journal.estimates()) == list(whole.journal.estimates())
    assert all(torch.equal(a, b) for a, b in zip(masters(again), masters(whole), strict=True))


@pytest.mark.parametrize("steps", [5, 6])
def test_a_run_that_is_done_is_not_resumed_by_a_step(tiny, tmp_path, steps):
    for _ in range(2):
        zo = trainer(tiny, tmp_path, max_steps=steps, lr_scheduler_type="constant")
        zo.train(resume_from_checkpoint=(tmp_path / "journal.db").exists())
        assert zo.journal.steps == zo.state.global_step == steps
        ended = masters(zo)
        zo.journal.close()
    assert all(torch.equal(a, b) for a, b in zip(masters(zo), ended, strict=True))


def test_skipped_steps_are_counted_over_a_resume(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "losses", no_losses)
    first = trainer(tiny, tmp_path, max_steps=3)
    first.train()
    first.journal.close()
    again = trainer(tiny, tmp_path, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.stepper.skipped == 3


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "ezo", "eps": 1e-2}, {"method": "quzo", "roundings": 2, "q": 2}, {"method": "zoqo"}],
    ids=["qzo", "ezo", "quzo", "zoqo"],
)
@pytest.mark.parametrize(
    "kind", [{"block": "Q6_K"}, {"architecture": "gemma3"}, {"architecture": "qwen2"}, {"architecture": "qwen3"}], ids=str
)
def test_both_losses_of_one_forward_are_those_of_two(options, kind, tmp_path, monkeypatch):
    path = tiny_gguf(tmp_path / "tiny.gguf", **kind)
    journals = []
    for tokens in (batches.PAIR_TOKENS, 0):
        monkeypatch.setattr(batches, "PAIR_TOKENS", tokens)
        forwards: list[int] = []
        zo = trainer(path, tmp_path / str(tokens), **options)
        assert independence(zo.model).halves
        zo.model.register_forward_pre_hook(lambda *_, seen=forwards: seen.append(1))
        zo.train()
        assert len(forwards) == 6 * options.get("q", 1) * (1 if tokens else 2)
        journals.append(list(zo.journal.estimates()))
    assert journals[0] == journals[1]


def test_accumulated_micro_batches_are_one_batch_under_one_direction(tiny, tmp_path):
    whole = trainer(tiny, tmp_path / "a", per_device_train_batch_size=4, max_steps=1)
    parts = trainer(tiny, tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1)
    for zo in (whole, parts):
        zo.train()
    (one,), (two,) = whole.journal.estimates(), parts.journal.estimates()
    assert one.losses[0] == pytest.approx(two.losses[0], abs=2e-2)


def test_examples_of_micro_batches_have_directions_of_their_own(tiny, tmp_path):
    whole = trainer(tiny, tmp_path / "a", method="ezo", per_device_train_batch_size=4, max_steps=1)
    parts = trainer(
        tiny, tmp_path / "b", method="ezo", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1
    )
    for zo in (whole, parts):
        zo.train()
    (one,), (two,) = whole.journal.estimates(), parts.journal.estimates()
    assert len(one.losses) == len(two.losses) == 4
    for mine, other in zip(one.losses, two.losses, strict=True):
        assert mine == pytest.approx(other, abs=2e-2)


def test_a_step_that_follows_the_estimates_is_as_long_as_asked(tiny, tmp_path):
    zo = trainer(tiny, tmp_path, method="ezo", ratio=0.2, eps=1e-2, max_steps=1, lr_scheduler_type="constant")
    before = [space.values.clone() for space in zo.create_optimizer().spaces]
    zo.train()
    units = [space.weight.unit() for space in zo.zeroth_order.spaces]
    moved = torch.cat([((b - a) / unit).flatten() for a, b, unit in zip(before, masters(zo), units, strict=True)])
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.2 * 1e-2, rel=0.05)


def test_each_examples_tokens_must_be_known(tmp_path, tiny):
    loaded = load_gguf(tiny)
    config = ZOConfig(output_dir=str(tmp_path), method="ezo", max_steps=1, use_cpu=True)
    zo = ZOTrainer(loaded.model, config, [{"input_ids": [1], "labels": [1]}] * 8, checkpoint=loaded)
    with pytest.raises(GradlessError, match="needs the example of each token, which Closure does not give"):
        zo.train()


def test_nzo_asks_for_one_of_the_same_few_words(tiny, tmp_path):
    loaded = load_gguf(tiny)
    config = ZOConfig(output_dir=str(tmp_path), method="nzo", use_cpu=True, disable_tqdm=True)
    zo = ZOTrainer(loaded.model, config, examples(loaded.tokenizer), checkpoint=loaded, processing_class=loaded.tokenizer)
    with pytest.raises(GradlessError, match="the same few words of one token each"):
        zo.train()


def test_nzo_tunes_layers_of_one_width(tiny, tmp_path):
    zo = trainer(tiny, tmp_path, method="nzo", target_modules="o_proj,gate_proj")
    with pytest.raises(GradlessError, match="write into one residual stream"):
        zo.train()


def test_an_option_without_the_one_it_goes_with_is_refused(tmp_path):
    with pytest.raises(GradlessError, match="unquantized_lr goes with --train-unquantized"):
        ZOConfig(output_dir=str(tmp_path), unquantized_lr=1e-3)


def test_a_head_does_not_know_whose_tokens_it_sees(tiny, tmp_path):
    with pytest.raises(GradlessError, match=r"token_embd\.weight does not see all tokens of a batch.*--exclude-modules"):
        trainer(tiny, tmp_path, method="ezo", target_modules="lm_head").train()


def test_the_unquantized_tensors_steps_follow_the_estimates_too(tiny, tmp_path):
    for name, more, lr in (("a", {}, 0.3), ("b", {"unquantized_lr": 1e-3}, 1e-3)):
        zo = trainer(tiny, tmp_path / name, lr="auto", train_unquantized=True, **more)
        scales, vectors = zo.create_optimizer().param_groups
        assert (scales["lr"], scales["auto"]) == (0.3, True)
        assert (vectors["lr"], vectors["auto"]) == (lr, not more)


@pytest.mark.parametrize("options", [{"lr": "auto"}, {"method": "ezo"}])
def test_eps_is_chosen_by_a_probe_where_steps_choose_themselves(tiny, tmp_path, options):
    zo = trainer(tiny, tmp_path / "probed", **options)
    header = zo.begun.header
    assert FACTORS[0] < header["eps_factor"] < FACTORS[-1]
    default = 1e-2 if options.get("method") == "ezo" else 2e-2
    assert [group["eps"] for group in header["groups"]] == [header["eps_factor"] * default]
    assert zo.create_optimizer().param_groups[0]["eps"] == header["groups"][0]["eps"]
    given = trainer(tiny, tmp_path / "given", eps=0.02, **options).begun.header
    assert (given["eps_factor"], given["groups"][0]["eps"]) == (None, 0.02)


def test_another_run_is_not_resumed(tiny, tmp_path):
    trainer(tiny, tmp_path).train()
    with pytest.raises(GradlessError, match=r"is another run \(config: eps: None there, 0\.02 here\)"):
        trainer(tiny, tmp_path, eps=0.02).train(resume_from_checkpoint=True)
    with pytest.raises(GradlessError, match=r"journal\.db exists"):
        trainer(tiny, tmp_path).train()


def test_a_version_with_another_option_is_resumed(tiny, tmp_path):
    first = trainer(tiny, tmp_path)
    first.begun.header["config"]["of_another_version"] = None
    first.train()
    first.journal.close()
    trainer(tiny, tmp_path).train(resume_from_checkpoint=True)


def test_a_run_that_is_out_of_time_is_not_resumed_by_a_step(tiny, tmp_path):
    first = trainer(tiny, tmp_path)
    first.train()
    done = first.journal.steps
    first.journal.close()
    again = trainer(tiny, tmp_path, max_steps=2 * done)
    again.check_same_run = lambda _: None
    again.clock.limit = 0.0
    again.train(resume_from_checkpoint=True)
    assert again.journal.steps == done


def test_hold_goes_with_whole_batches(tmp_path):
    with pytest.raises(GradlessError, match="hold compares"):
        ZOConfig(output_dir=str(tmp_path), method="zoqo", hold=True, gradient_accumulation_steps=2, use_cpu=True)


def test_other_threads_are_refused_unless_allowed(tiny, tmp_path, monkeypatch):
    first = trainer(tiny, tmp_path)
    first.train()
    first.journal.close()
    monkeypatch.setattr("gradless.training.start.torch.get_num_threads", lambda: 77)
    again = trainer(tiny, tmp_path)
    with pytest.raises(GradlessError, match=r"threads: \d+ there, 77 here.*--allow-changes"):
        again.train(resume_from_checkpoint=True)
    again.allow_changes = True
    again.train(resume_from_checkpoint=True)


def test_nan_losses_are_counted_and_end_a_run(tiny, tmp_path, monkeypatch):
    zo = trainer(tiny, tmp_path / "some")
    losses = objectives.losses

    def sometimes(*inputs):
        each, right = losses(*inputs)
        return each * float("nan") if zo.state.global_step == 2 else each, right

    monkeypatch.setattr(objectives, "losses", sometimes)
    zo.train()
    assert (zo.stepper.skipped, zo.journal.steps) == (1, 6)
    monkeypatch.setattr(objectives, "losses", no_losses)
    always = trainer(tiny, tmp_path / "all")
    with pytest.raises(GradlessError, match=r"not finite in 5 steps in a row.*smaller --lr"):
        always.train()


def dense_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=260, num_key_value_heads=2, **sizes)).bfloat16()


def test_any_dense_model_with_any_data_set(tmp_path):
    ids = torch.arange(12) % 7
    data = [{"input_ids": ids, "labels": ids} for _ in range(16)]
    config = ZOConfig(
        output_dir=str(tmp_path), method="mezo", lr=1e-3, eps=1e-2, max_steps=5, per_device_train_batch_size=4, use_cpu=True
    )
    zo = ZOTrainer(dense_model(), config, data)
    before = [p.clone() for p in zo.model.parameters()]
    zo.train()
    assert Journal.open(tmp_path / "journal.db").steps == 5
    assert any(not torch.equal(a, b) for a, b in zip(zo.model.parameters(), before, strict=True))


def test_qzo_on_a_dense_model_is_refused(tmp_path):
    zo = ZOTrainer(dense_model(), ZOConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True), [{"input_ids": [1]}] * 4)
    with pytest.raises(GradlessError, match="this model has none; use --method mezo"):
        zo.train()


def test_epochs_have_their_own_order():
    sampler = SeededSampler(10, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == sorted(sampler) == list(range(10))
    assert first != list(sampler)


def test_callbacks_logs_and_compute_metrics_work(tiny, tmp_path):
    logged, chosen = [], []

    class Logs(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            del args, control
            logged.append((state.global_step, logs))

    def metrics(prediction):
        chosen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"share_of_yes": (prediction.predictions.argmax(1) == 1).astype("float32").mean()}

    loaded = load_gguf(tiny)
    config = ZOConfig(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=1, use_cpu=True, lr=1e-3
    )
    rows = examples(loaded.tokenizer)
    more = {"compute_metrics": metrics, "callbacks": [Logs()], "processing_class": loaded.tokenizer}
    ZOTrainer(loaded.model, config, rows, rows[:5], checkpoint=loaded, **more).train()
    assert [step for step, each in logged if "loss" in each] == [1, 2]
    assert all(0 <= each["eval_share_of_yes"] <= 1 for _, each in logged if "eval_loss" in each)
    assert chosen == [((5, 2), (5,))] * 2


def test_runs_are_reported_to_tensorboard(tiny, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    zo = trainer(tiny, tmp_path, max_steps=2, logging_steps=1, report_to="tensorboard", logging_dir=str(tmp_path / "logs"))
    zo.train()
    assert list(tmp_path.rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    "given",
    [
        lambda model: QZO(scales(model), lr=0.1, eps=1e-2, q=2, seed=5, distribution="rademacher"),
        lambda model: QuZO(codes(model, stride=2, residual=True), lr=0.3, eps=0.4, roundings=2),
        lambda model: ZOQO(codes(model, clamp=True), lr=1.0, whole_steps=True, distribution="uniform", eps=2.0),
        lambda model: EZO(offsets(model), lr=0.1, eps=1e-2),
    ],
    ids=["qzo", "quzo", "zoqo", "ezo"],
)
def test_an_optimizer_that_somebody_built_is_in_the_journal(tiny, tmp_path, given):
    loaded = load_gguf(tiny)
    config = ZOConfig(output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=4, use_cpu=True)
    zo = ZOTrainer(
        loaded.model,
        config,
        examples(loaded.tokenizer),
        checkpoint=loaded,
        processing_class=loaded.tokenizer,
        optimizers=(given(loaded), None),
    )
    zo.train()
    loaded.save(tmp_path / "tuned.gguf")
    zo.journal.close()
    replay(str(tiny), str(tmp_path / "run" / "journal.db"), str(tmp_path / "again.gguf"))
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "tuned.gguf").read_bytes() != tiny.read_bytes()


def test_an_optimizer_without_a_recipe_is_refused(tiny, tmp_path):
    class Mine(QZO):
        pass

    loaded = load_gguf(tiny)
    config = ZOConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True)
    zo = ZOTrainer(loaded.model, config, examples(loaded.tokenizer), checkpoint=loaded, optimizers=(Mine(scales(loaded)), None))
    with pytest.raises(GradlessError, match="Mine has no recipe"):
        zo.train()


def test_a_trainer_whose_model_was_tuned_is_not_resumed(tiny, tmp_path):
    zo = trainer(tiny, tmp_path, max_steps=2)
    zo.train()
    with pytest.raises(GradlessError, match="tuned already, and a resume begins with the base"):
        zo.train(resume_from_checkpoint=True)


def test_a_refused_resume_is_no_resume_later(tiny, tmp_path):
    trainer(tiny, tmp_path / "a", max_steps=2).train()
    zo = trainer(tiny, tmp_path / "b", max_steps=2, eps=0.02)
    with pytest.raises(GradlessError, match="is another run"):
        zo.train(resume_from_checkpoint=str(tmp_path / "a"))
    zo.train()
    assert [Journal.open(tmp_path / name / "journal.db", to_go_on=True).steps for name in "ab"] == [2, 2]


def test_the_clock_ends_a_run_and_does_not_count_what_came_before_it(tiny, tmp_path):
    zo = trainer(tiny, tmp_path, max_steps=6)
    zo.clock._before = 0.0
    zo.clock._began -= 1000.0
    zo.clock.limit = 1e-3
    zo.train()
    assert zo.journal.steps == 1
    assert zo.journal.seconds < 500


def test_what_was_asked_of_a_block_without_offsets_is_kept(tmp_path):
    loaded = load_gguf(tiny_gguf(tmp_path / "tiny.gguf", block="Q6_K"))
    method = EZO(offsets(loaded))
    assert setup_of(method, loaded).groups[0]["part"] == "offset"


def test_directions_without_a_name_are_not_journaled(tiny):
    loaded = load_gguf(tiny)
    method = ZOQO(codes(loaded), distribution=noise.uniform_grid(2))
    with pytest.raises(GradlessError, match="a journal keeps directions by name"):
        setup_of(method, loaded)


def test_several_sets_of_held_out_rows_are_measured(tiny, tmp_path):
    loaded = load_gguf(tiny)
    rows = examples(loaded.tokenizer)
    config = ZOConfig(output_dir=str(tmp_path), max_steps=1, eval_strategy="steps", eval_steps=1, use_cpu=True, lr=1e-3)
    held_out = {"few": rows[:3], "more": rows[:6]}
    zo = ZOTrainer(loaded.model, config, rows, held_out, checkpoint=loaded, processing_class=loaded.tokenizer)
    zo.train()
    assert {"eval_few_accuracy", "eval_more_accuracy"} <= zo.evaluate().keys()
