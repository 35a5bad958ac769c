"""The command line. It parses, calls `run` and prints; torch is imported only when a command needs it."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import traceback
from dataclasses import fields
from pathlib import Path

from gradless import __version__
from gradless.attacks.options import AttackOptions
from gradless.errors import GradlessError
from gradless.files import cache_folder, covers, sweep
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
ERROR_LOG = "gradless-error.log"
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
    add_flags(tune, RunOptions)

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
        help="The tuned model, or adapter, to write: a file for a GGUF, else a folder.",
    )
    replay.add_argument("--overwrite", action="store_true", help="Replace it where it exists.")

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
    plan.add_argument("--bits", type=int, metavar="N", help="What a dense model would be quantized to. (default: 4)")
    plan.add_argument("--group-size", type=int, metavar="N", help="Weights of a row that would share a range. (default: 64)")

    dequantize = _command(commands, "dequantize", "Write a quantized model as a dense bf16 folder.", DEQUANTIZE_EXAMPLES)
    dequantize.add_argument("model", help=QUANTIZED_HELP)
    dequantize.add_argument("--output", required=True, metavar="DIR", help="The folder to write.")
    dequantize.add_argument("--overwrite", action="store_true", help="Replace it where it exists.")

    quantize = _command(commands, "quantize", "Round a dense folder's linear layers to a grid.", QUANTIZE_EXAMPLES)
    quantize.add_argument("model", help="A folder of a dense model.")
    add_flags(quantize, RunOptions, ["bits", "grid", "group_size", "search"])
    quantize.add_argument("--output", required=True, metavar="DIR", help="The folder to write.")
    quantize.add_argument("--overwrite", action="store_true", help="Replace it where it exists.")

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
    types = {field.name: str(field.type) for field in fields(RunOptions)}
    return {name: _typed(path, name, value, types[name]) for name, value in content.items()}


def _typed(path: Path, name: str, value: object, wanted: str) -> object:
    """A YAML value as the option's type; YAML reads 1e-3 as a string, and a path such as 7 as a number."""
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


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parsed = parser().parse_args(arguments)
    try:
        return _COMMANDS[parsed.command](parsed)
    except GradlessError as error:
        print(f"gradless: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("gradless: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"gradless: {_last_resort(error, getattr(parsed, 'output', None))}", file=sys.stderr)
        return 1


def _last_resort(error: Exception, output: str | None) -> str:
    """A sentence for what should have had one of its own; the traceback goes to a log in the output folder, or in the cache."""
    first_line = (str(error).splitlines() or [""])[0][:200]
    what = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    cache = cache_folder()
    for folder in ([Path(output)] if output else []) + [cache]:
        if folder != cache and not folder.is_dir():
            continue
        log = folder / ERROR_LOG
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            log.write_text("".join(traceback.format_exception(error)))
            return f"something that it was not made for happened ({what}); {log} has the details: please report them."
    return f"something that it was not made for happened ({what}); please report it."


def _tune(parsed: argparse.Namespace) -> int:
    options = run_options(parsed)
    _prepare_libraries()
    from gradless import run

    summary = run.tune(parsed.model, parsed.data, options, quiet=parsed.json)
    if parsed.json:
        print(json.dumps(summary))
    return 0 if summary["finished"] else 130


def _eval(parsed: argparse.Namespace) -> int:
    options = run_options(parsed)
    _prepare_libraries()
    import torch

    from gradless import run

    if options.threads:
        torch.set_num_threads(options.threads)
    result = run.evaluate(parsed.model, parsed.data, options, adapter=parsed.adapter, quiet=parsed.json)
    if parsed.json:
        print(json.dumps(result))
    else:
        print(
            "  ".join(
                f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in result.items()
            )
        )
    return 0


def _replay(parsed: argparse.Namespace) -> int:
    _prepare_libraries()
    from gradless.replaying import replay

    result = replay(parsed.model, parsed.journal, parsed.output, overwrite=parsed.overwrite, quiet=parsed.json)
    if parsed.json:
        print(json.dumps(result))
    else:
        print(f"wrote {result['output']}: {result['steps']} steps at {result['steps_per_second']} a second")
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    _prepare_libraries()
    from gradless import verify

    report = verify.verify(parsed.run, base=parsed.base, salvage=parsed.salvage)
    print(json.dumps(report) if parsed.json else verify.as_text(report))
    return 0 if report["whole"] else 1


def _info(parsed: argparse.Namespace) -> int:
    from gradless.report import info

    description = info.describe(parsed.model, run_options(parsed).eps)
    print(json.dumps(description) if parsed.json else info.as_text(description))
    return 0


def _plan(parsed: argparse.Namespace) -> int:
    _prepare_libraries()
    from gradless import memory
    from gradless.formats.hub import local

    methods = (
        [*memory.FIRST_ORDER, *RECIPES] if parsed.methods == "all" else [name.strip() for name in parsed.methods.split(",")]
    )
    shapes = memory.shapes_of(local(parsed.model), bits=parsed.bits, group_size=parsed.group_size)
    planned = memory.plan(shapes, methods, batch_size=parsed.batch_size, length=parsed.length)
    print(json.dumps(planned) if parsed.json else memory.as_text(planned))
    return 0


def _attack(parsed: argparse.Namespace) -> int:
    names = {field.name for field in fields(AttackOptions)}
    options = AttackOptions(**{name: value for name, value in vars(parsed).items() if name in names})
    from gradless.attacks.run import attack

    result = attack(parsed.model, parsed.images, options, quiet=parsed.json)
    if parsed.json:
        print(json.dumps(result))
    else:
        found, spent = 1 - result["failure_rate"], result["median_queries"]
        print(
            f"{found:.1%} of {result['images']} images have an adversarial twin"
            + (f", found in {spent:g} queries (median)" if spent is not None else "")
            + f"; {result['total_queries']} queries in all\nwrote {result['result']} and {result['report']}"
        )
    return 0


def _dequantize(parsed: argparse.Namespace) -> int:
    _prepare_libraries()
    from gradless.formats.dense import write_folder
    from gradless.formats.load import load
    from gradless.formats.quantized import QuantizedModel, dequantized

    output = _free_output(parsed)
    loaded = load(parsed.model)
    if not isinstance(loaded, QuantizedModel):
        raise GradlessError(f"{parsed.model} is dense already; give a quantized file or folder.")
    write_folder(dequantized(loaded), loaded.tokenizer, output)
    print(json.dumps({"output": str(output)}) if parsed.json else f"wrote {output}")
    return 0


def _quantize(parsed: argparse.Namespace) -> int:
    options = run_options(parsed)
    _prepare_libraries()
    from gradless import run
    from gradless.formats.load import load

    output = _free_output(parsed)
    result = run.quantize(load(parsed.model), output, options)
    print(json.dumps(result) if parsed.json else f"wrote {result['output']}: {result['bytes']:,} bytes, {result['grid']}")
    return 0


def _free_output(parsed: argparse.Namespace) -> Path:
    """The folder to write, unless it exists; with --overwrite it may, but never the model itself. What a killed command left
    beside it is removed."""
    output = Path(parsed.output)
    sweep(output.parent)
    if output.exists() and (not parsed.overwrite or covers(output, Path(parsed.model))):
        raise GradlessError(f"{output} exists; give --overwrite to replace it (never the model itself), or another --output.")
    return output


LOST_PAGE = (
    "gradless: a file that is read became shorter while it was in use, and this process cannot go on; every step is in the "
    "journal: put the file back and run the same command with --resume.\n"
)


def _prepare_libraries() -> None:
    """Keep the libraries quiet and quick, and have a file that becomes shorter while it is mapped end in a sentence."""
    gc.set_threshold(100_000)  # importing them makes a million objects that stay: looking for garbage among them takes a second
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with contextlib.suppress(OSError):  # the kernels were not compiled
        from gradless.kernels.cpu import end_on_lost_page

        end_on_lost_page(LOST_PAGE)


_COMMANDS = {
    "tune": _tune,
    "eval": _eval,
    "replay": _replay,
    "verify": _verify,
    "info": _info,
    "plan": _plan,
    "dequantize": _dequantize,
    "quantize": _quantize,
    "attack": _attack,
}

if __name__ == "__main__":
    sys.exit(main())
