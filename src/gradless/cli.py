"""The command line: it parses, calls and prints. torch is imported only if a command needs it."""

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

from gradless.arguments import parser, run_options
from gradless.attacks.options import AttackOptions
from gradless.errors import GradlessError
from gradless.files import cache_folder, covers, sweep
from gradless.methods.registry import RECIPES

ERROR_LOG = "gradless-error.log"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parsed = parser().parse_args(arguments)
    try:
        return _COMMANDS[parsed.command](parsed)
    except GradlessError as error:
        print(f"gradless: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("gradless: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"gradless: {_last_resort(error, getattr(parsed, 'output', None))}", file=sys.stderr)
        return 1


def _last_resort(error: Exception, output: str | None) -> str:
    """A sentence for an error without one of its own; its traceback goes to a log in the output folder, or in the cache."""
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
            return f"an unexpected error occurred ({what}); {log} has the details: please report them."
    return f"an unexpected error occurred ({what}); please report it."


def _tune(parsed: argparse.Namespace) -> int:
    options = run_options(parsed)
    _prepare_libraries()
    from gradless.tuning import tune

    summary = tune(parsed.model, parsed.data, options, quiet=parsed.json)
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
    """The folder to write. It must not exist, unless --overwrite is given; it is never the model itself. Leftovers of a killed
    command beside it are removed."""
    output = Path(parsed.output)
    sweep(output.parent)
    if output.exists() and (not parsed.overwrite or covers(output, Path(parsed.model))):
        raise GradlessError(f"{output} exists; give --overwrite to replace it (never the model itself), or another --output.")
    return output


LOST_PAGE = (
    "gradless: an input file became shorter while it was in use, so this process must end; every step is in the journal: put "
    "the file back and run the same command with --resume.\n"
)


def _prepare_libraries() -> None:
    """Keep the libraries quiet and quick, and end with a sentence if a mapped file becomes shorter."""
    gc.set_threshold(100_000)  # imports make a million lasting objects; a search for garbage among them takes a second
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
