"""flags.py and the options: every number is finite and in its range, wherever it comes from."""

import math
from dataclasses import fields

import pytest
import torch

from gradless import QZO
from gradless.arguments import parser, run_options
from gradless.attacks.options import AttackOptions
from gradless.cli import main
from gradless.errors import GradlessError
from gradless.formats.adapter import AdaptedModel, LoRA
from gradless.formats.gguf_model import load_gguf
from gradless.training.options import RunOptions

NUMBERS = {
    options: [each for each in fields(options) if "int" in each.type.split(" | ") or "float" in each.type.split(" | ")]
    for options in (RunOptions, AttackOptions)
}
EACH = [(options, each) for options, found in NUMBERS.items() for each in found]


@pytest.mark.parametrize(("options", "each"), EACH, ids=lambda value: getattr(value, "name", ""))
def test_every_number_has_a_range_and_values_out_of_it_are_refused(options, each):
    within = each.metadata["within"]
    assert math.isfinite(within.most)
    for value in (math.inf, -math.inf, math.nan, -1, 10**30, 2**70, True, [1]):
        assert value not in within, value
        given = {"eps": 0.1, "output": "x"} if options is AttackOptions else {}
        with pytest.raises(GradlessError, match=rf"^{each.name} is .*; it must be a (whole )?number"):
            options(**(given | {each.name: value})).check()
    assert each.default is None or each.default in within


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "inf"], "lr is inf; it must be a number above zero and at most 1,000,000"),
        (["--lr", "nan"], "lr is nan"),
        (["--eps", "1e400"], "eps is inf"),
        (["--threads", "100000"], "threads is 100000; it must be a number above zero, whole and at most 1,024"),
        (["--threads", "0"], "threads is 0"),
        (["--batch-size", "1000000000"], "batch_size is 1000000000"),
        (["--steps", "1000000000000000000"], "steps is"),
        (["--seed", str(2**70)], "seed is 1180591620717411303424; it must be a whole number from 0 on"),
        (["--max-minutes", "inf"], "max_minutes is inf"),
        (["--max-length", "1"], "max_length is 1"),
        (["--eval-every", "0"], "eval_every is 0"),
        (["--q", "10000000000"], "q is 10000000000"),
        (["--method", "quzo", "--lora", "8", "--lora-alpha", "inf"], "lora_alpha is inf"),
        (["--method", "quzo", "--lora", "8", "--lora-bits", "9"], "lora_bits is 9; it must be a whole number from 2 to 8"),
        (["--group-size", "²"], "group_size is '²'"),
        (["--group-size", "9" * 5000], "group_size is '999"),
    ],
)
def test_a_flag_out_of_range_is_one_sentence(arguments, message, capsys):
    assert main(["tune", "none.gguf", "none.tsv", *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "text",
    ["lr: .inf", "lr: .nan", "lr: 1e400", "threads: 100000", "q: 1" + "0" * 400, "seed: -1", "lora: true", "q: [1]", "q: \xff"],
)
def test_a_configuration_out_of_range_is_one_sentence(tmp_path, text):
    (tmp_path / "run.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(GradlessError):
        run_options(parser().parse_args(["tune", "a", "b", "--config", str(tmp_path / "run.yaml")]))


def test_a_rank_above_every_layers_is_refused_at_once(tiny):
    with pytest.raises(GradlessError, match="lora is 60000; no layer of this model has a rank above"):
        AdaptedModel(load_gguf(tiny), LoRA(60000))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_not_written(tiny, tmp_path, value):
    loaded = load_gguf(tiny)
    method = QZO(loaded.spaces("blocks", loaded.file.linear_layers()))
    torch.nn.init.constant_(method.spaces[-1].values, value)
    with pytest.raises(GradlessError, match=r"tuned values of .* are not finite"):
        loaded.save(tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_yaml_takes_what_a_flag_takes(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: auto\nmethod: qzo\nratio: 0.1\n")
    options = run_options(parser().parse_args(["tune", "a", "b", "--config", str(tmp_path / "run.yaml")]))
    assert (options.lr, options.ratio) == ("auto", 0.1)


def test_auto_takes_the_options_of_any_method_that_it_may_choose():
    assert RunOptions(master=True).chosen(quantized=False, one_word=False).method == "mezo"
    with pytest.raises(GradlessError, match="master is for mezo; qzo does not read it"):
        RunOptions(master=True).chosen(quantized=True, one_word=True)
    with pytest.raises(GradlessError, match="hold is for zoqo; qzo does not read it"):
        RunOptions(hold=True)
    with pytest.raises(GradlessError, match=r"method is 'speed'; it can be auto, nzo, .*mezo"):
        RunOptions(method="speed")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "qzo", "distribution": "uniform"},
        {"method": "zoqo", "distribution": "rademacher"},
        {"method": "quzo", "distribution": "uniform"},
        {"method": "zoqo", "weight_decay": 0.1},
    ],
)
def test_noise_that_a_method_cannot_draw_is_refused_at_once(options):
    with pytest.raises(GradlessError, match=r"gaussian.*(rademacher|weight_decay)"):
        RunOptions(**options)
