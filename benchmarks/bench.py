"""Every ratio that gradless is held to, in one run: steps and forwards, the integer product, llama.cpp, memory.

    python benchmarks/bench.py          # or: make bench
    python benchmarks/bench.py --json

Each part is a process of its own and can be run alone (step.py, matmul.py, llama_cpp.py, memory.py). A ratio of times is given
only where the machine let both of its sides run undisturbed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from timing import shown

PARTS = ("step", "matmul", "llama_cpp", "memory")
AIMS = {
    "QZO step / two forwards": "<= 1.07",
    "QuZO step / two forwards": "<= 1.07",
    "ZOQO step / two forwards": "<= 1.07",
    "textbook MeZO step / QZO step": ">= 6",
    "transformers' bf16 forward, all logits / our int8 forward": ">= 1.6",
    "our int8 forward / llama.cpp, tokens a second": ">= 6",
    "int8 2048x2048x2048 / peak": ">= 0.6",
    "resident memory of a QZO step / of a forward, libraries included": "<= 1.05",
    "resident memory of NZO / of a forward, libraries included": "<= 1.1",
    "our forward with all threads / with one": "<= 0.55",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    parts = {}
    for name in PARTS:
        print(f"{name}.py ...", file=sys.stderr, flush=True)
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--json"]
        parts[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    if arguments.json:
        print(json.dumps(parts))
        return
    print("| ratio | measured | aim |\n|---|---|---|")
    for part in parts.values():
        for name, value in part["ratios"].items():
            print(f"| {name} | {shown(value)} | {AIMS.get(name, '')} |")


if __name__ == "__main__":
    main()
