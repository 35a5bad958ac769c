"""The arguments of the command line: its parser, and the options of a run that flags and --config give together.

Importing this module is cheap: torch is not there yet.
"""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import fields
from pathlib import Path

from gradless import __version__
from gradless.attacks.options import AttackOptions
from gradless.errors import GradlessError
from gradless.flags import add_flags
from gradless.methods.registry import RECIPES
from gradless.training.options import RunOptions

TUNE_EXAMPLES = """\
examples:
  gradless tune model.gguf train.tsv --eval dev.tsv --task sst2 --output runs/first
  gradless tune model.gguf tickets.csv --template "{text} This is" --labels bug=broken,wish=desired --max-minutes 20
  gradless tune model.gguf train.tsv --task sst2 --output runs/first --resume
  gradless tune org/Model-GPTQ-Int4 train.tsv --task sst2 --target-modules q_proj,v_proj --output runs/gptq
  gradless tune model.gguf train.tsv --task sst2 --method quzo --output runs/quzo
  gradless tune dense-folder/ train.tsv --task sst2 --method zoqo --bits 8 --output runs/zoqo
  gradless tune model.gguf train.tsv --task sst2 --method zoqo --lora 8 --output runs/lora
  gradless tune dense-folder/ train.tsv --task sst2 --method mezo --output runs/mezo
  gradless tune model.gguf train.tsv --config run.yaml
"""
EVAL_EXAMPLES = """\
examples:
  gradless eval runs/first/model.gguf dev.tsv --task sst2 --json
  gradless eval model.gguf dev.tsv --task sst2 --adapter runs/lora/adapter
  gradless eval model.gguf dev.tsv --template "Review: {text}\\nSentiment:" --labels 0=negative,1=positive
"""
REPLAY_EXAMPLES = """\
example:
  gradless replay model.gguf runs/first/journal.db --output tuned.gguf
"""
VERIFY_EXAMPLES = """\
examples:
  gradless verify runs/first
  gradless verify runs/first --base model.gguf --json
  gradless verify runs/damaged --salvage
"""
INFO_EXAMPLES = """\
example:
  gradless info model.gguf
"""
PLAN_EXAMPLES = """\
examples:
  gradless plan model.gguf
  gradless plan dense-folder/ --methods adamw,lora,qzo --batch-size 1 --length 512 --bits 4 --group-size 128
  gradless plan config.json --json
"""
DEQUANTIZE_EXAMPLES = """\
example:
  gradless dequantize model.gguf --output dense-folder
"""
QUANTIZE_EXAMPLES = """\
examples:
  gradless quantize dense-folder --bits 4 --group-size 64 --output packed-folder
  gradless quantize dense-folder --grid fp8 --group-size channel --output packed-folder
"""
ATTACK_EXAMPLES = """\
examples:
  gradless attack --model my_module:predict --images images.npz --eps 8/255 --output runs/attack
  gradless attack --model net.onnx --images images.npz --bits 4 --eps 0.3 --max-queries 1000 --output runs/onnx
  gradless attack --model https://host/predict --rate 20 --images images.npz --eps 0.1 --max-total-queries 900 --output runs/api
  gradless attack --model https://host/predict --rate 20 --images images.npz --eps 0.1 --output runs/api --resume
"""
QUANTIZED_HELP = (
    "A GGUF file, a quantized folder (GPTQ, AWQ, AutoRound, AQLM, bitsandbytes, ours), or the name of either on the Hub."
)
DATA_HELP = "JSONL, CSV, TSV, Parquet or SQuAD JSON, or the name of a data set."
EVAL_OPTIONS = (
    "task",
    "template",
    "labels",
    "split",
    "eval_rows",
    "max_length",
    "train_on",
    "batch_size",
    "activations",
    "threads",
    "trust_remote_code",
)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="gradless",
        description="Fine-tune a quantized model with forward passes only, and get the same file format back.",
    )
    top.add_argument("--version", action="version", version=f"gradless {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    tune = _command(commands, "tune", "Tune a model on labelled rows.", TUNE_EXAMPLES)
    tune.add_argument("model", help=f"{QUANTIZED_HELP} A dense folder for mezo, --bits, --grid or --lora.")
    tune.add_argument("data", help=DATA_HELP)
    tune.add_argument("--config", metavar="FILE", help="YAML with the same names as these options; options given here win.")
    names = [field.name for field in fields(RunOptions)]
    add_flags(tune, RunOptions, sorted(names, key=lambda name: name != "method"))  # the method first

    evaluate = _command(commands, "eval", "Measure a model on labelled rows.", EVAL_EXAMPLES)
    evaluate.add_argument("model", help=f"{QUANTIZED_HELP} A dense folder, too.")
    evaluate.add_argument("data", help=DATA_HELP)
    evaluate.add_argument("--adapter", metavar="DIR", help="Measure it with the LoRA adapter of this PEFT folder.")
    add_flags(evaluate, RunOptions, EVAL_OPTIONS)

    replay = _command(commands, "replay", "Rebuild a tuned model from its base and its journal.", REPLAY_EXAMPLES)
    replay.add_argument("model", help="The base that the run began with.")
    replay.add_argument("journal", help="The run's journal.db.")
    replay.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="The tuned model, or adapter, to write: a file for a GGUF, otherwise a folder.",
    )
    replay.add_argument("--overwrite", action="store_true", help="Replace it if it exists.")

    verify = _command(commands, "verify", "Say whether a run's base, journal and tuned model belong together.", VERIFY_EXAMPLES)
    verify.add_argument("run", help="The run's folder, or its journal.db.")
    verify.add_argument("--base", metavar="MODEL", help="The model that the run began with.")
    verify.add_argument(
        "--salvage", action="store_true", help="Keep the whole steps of a damaged journal in a new one, journal.salvaged.db."
    )

    info = _command(commands, "info", "Show what a file holds and what each method would tune.", INFO_EXAMPLES)
    info.add_argument("model", help=QUANTIZED_HELP)
    add_flags(info, RunOptions, ["eps"])

    plan = _command(commands, "plan", "Predict the peak memory of tuning a model, by method.", PLAN_EXAMPLES)
    plan.add_argument("model", help="A GGUF file, a model's folder, quantized or dense, or a config.json.")
    plan.add_argument(
        "--methods",
        default="all",
        metavar="A,B,..",
        help=f"Some of: adamw, sgd, qat, lora, qlora, {', '.join(RECIPES)}. (default: all)",
    )
    plan.add_argument("--batch-size", type=int, default=16, metavar="N", help="Examples in a forward. (default: 16)")
    plan.add_argument("--length", type=int, default=128, metavar="N", help="Tokens of an example. (default: 128)")
    plan.add_argument("--bits", type=int, metavar="N", help="Bits that a dense model would be quantized to. (default: 4)")
    plan.add_argument("--group-size", type=int, metavar="N", help="Weights of a row that would share a range. (default: 64)")

    dequantize = _command(commands, "dequantize", "Write a quantized model as a dense bf16 folder.", DEQUANTIZE_EXAMPLES)
    dequantize.add_argument("model", help=QUANTIZED_HELP)
    dequantize.add_argument("--output", required=True, metavar="DIR", help="The folder to write.")
    dequantize.add_argument("--overwrite", action="store_true", help="Replace it if it exists.")

    quantize = _command(commands, "quantize", "Round a dense folder's linear layers to a grid.", QUANTIZE_EXAMPLES)
    quantize.add_argument("model", help="A folder of a dense model.")
    add_flags(quantize, RunOptions, ["bits", "grid", "group_size", "search"])
    quantize.add_argument("--output", required=True, metavar="DIR", help="The folder to write.")
    quantize.add_argument("--overwrite", action="store_true", help="Replace it if it exists.")

    attack = _command(commands, "attack", "Find adversarial images of a model that can only be queried.", ATTACK_EXAMPLES)
    attack.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="module:attribute (a callable or a torch module), a file.onnx, or an address.",
    )
    attack.add_argument("--images", required=True, metavar="FILE", help="A .npz with `images` and `labels`.")
    add_flags(attack, AttackOptions)
    return top


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, examples: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=text, description=text, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--json", action="store_true", help="Print one JSON object, and nothing else, on standard output.")
    return command


def run_options(arguments: argparse.Namespace) -> RunOptions:
    """The options that a command line and its --config give together.

    Raises:
        GradlessError: the configuration cannot be read, or has a name that is no option.
    """
    names = {field.name for field in fields(RunOptions)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    if getattr(arguments, "config", None):
        given = {**_read_config(Path(arguments.config), names), **given}
    return RunOptions(**given)


def _read_config(path: Path, names: set[str]) -> dict[str, object]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise GradlessError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise GradlessError(f"--config {path} is not a list of 'name: value' lines.")
    content = {str(name).replace("-", "_"): value for name, value in content.items()}
    unknown = sorted(content.keys() - names)
    if unknown:
        raise GradlessError(f"--config {path} has no option {unknown[0]!r}; see gradless tune --help for their names.")
    known = {field.name: field for field in fields(RunOptions)}
    return {
        name: value if value in known[name].metadata.get("texts", ()) else _typed(path, name, value, str(known[name].type))
        for name, value in content.items()
    }


def _typed(path: Path, name: str, value: object, wanted: str) -> object:
    """A YAML value in the option's type. YAML reads 1e-3 as a string, and a path such as 7 as a number."""
    if value is None and "None" in wanted:
        return None
    made: object = None
    if "bool" in wanted or isinstance(value, bool):
        made = value if "bool" in wanted and isinstance(value, bool) else None
    elif ("float" in wanted or "int" in wanted) and isinstance(value, str | int | float):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            made = float(value) if "float" in wanted else int(value) if float(value).is_integer() else None
    elif isinstance(value, str | int | float):
        made = str(value)
    if made is None:
        what = {"bool": "true or false", "float": "a number", "int": "a whole number", "str": "text"}[wanted.split(" ")[0]]
        held = f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value)
        raise GradlessError(f"--config {path}: {name} is {held}, not {what}.")
    return made
