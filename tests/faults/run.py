"""Every write of a run, a quantization, a replay and an attack goes wrong once; and runs are killed at random moments.

    python -m tests.faults.run --kills 300 --seed 0
    python -m tests.faults.run --kills 0 --only "tune qzo,replay" --ways FULL,KILL
    python -m tests.faults.run --kills 0 --every 10

After each fault the folder is as before, complete, or resumed to the byte. What is not is printed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.faults.scenarios import METHODS, Lost, Materials, Scenario, Trial
from tests.faults.server import Server, Way, compiled


def main() -> int:
    """Print what was tried and what was lost; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="kills at random moments, over all methods (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--every", type=int, default=1, help="disturb every n-th call only (default: 1)")
    parser.add_argument("--only", default="", help="names of scenarios, with commas (default: all)")
    parser.add_argument("--ways", default="ONCE,FULL,GONE,KILL,TORN", help="what goes wrong (default: all)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made).resolve()
        shim = compiled(folder)
        if shim is None:
            print("there is no C compiler, or this is not Linux: nothing was tried")
            return 0
        server = Server(shim, folder)
        materials = Materials(folder, server)
        materials.models()
        lost = 0
        ways = [Way[name] for name in asked.ways.split(",")]
        for make in scenarios(materials):
            scenario = make()
            if not asked.only or scenario.name in asked.only.split(","):
                lost += disturb(Trial(scenario, server), ways, asked.every, asked.seed)
        lost += kill(materials, asked.kills, random.Random(asked.seed))
        server.close()
    print(f"{lost} lost")
    return int(lost > 0)


def scenarios(materials: Materials) -> list[Callable[[], Scenario]]:
    """What is disturbed at every call."""
    one = materials
    return [
        one.attack,
        one.attack_resume,
        one.attack_overwrite,
        one.replay,
        one.quantize,
        lambda: one.quantize(replaces=True),
        one.dequantize,
        lambda: one.run("qzo"),
        one.resume,
        one.overwrite,
        lambda: one.run("bits"),
        lambda: one.run("lora"),
    ]


def disturb(trial: Trial, ways: list[Way], every: int, seed: int) -> int:
    """Let each call of a scenario go wrong in each way; how many were lost."""
    began, lost, tried = time.monotonic(), Counter[str](), Counter[str]()
    for way in ways:
        for at in list(trial.points(way))[seed % every :: every]:
            tried[way.name] += 1
            try:
                trial.fault(way, at)
            except Lost as error:
                kind, path = trial.calls[at]
                print(f"  {way.name} at {at} ({kind} {Path(path).name}): {error}", flush=True)
                lost[way.name] += 1
    shown = ", ".join(f"{way} {n}" for way, n in tried.items())
    print(
        f"{trial.scenario.name}: {len(trial.calls)} calls; {tried.total()} faults ({shown}); {trial.states} different folders "
        f"recovered; {lost.total()} lost; {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return lost.total()


def kill(materials: Materials, kills: int, rng: random.Random) -> int:
    """Kill runs of every method at random moments, half of them again while they are resumed, and a few by the signals of a
    terminal; resume them. How many were lost."""
    lost = 0
    for number, method in enumerate(METHODS if kills else ()):
        trial = Trial(materials.run(method), materials.server)
        killed, wanted = 0, kills // len(METHODS) + (number < kills % len(METHODS))
        signals = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        while killed < wanted or signals:
            sent = signal.SIGKILL if killed < wanted else signals.pop()
            moments = [rng.uniform(0.1, 1.1) * trial.seconds for _ in range(rng.choice([1, 2]))]
            try:
                killed += trial.kill(*moments, number=sent)
            except Lost as error:
                print(f"  {sent.name} after {moments} s: {error}", flush=True)
                lost, killed = lost + 1, killed + 1
        print(f"{trial.scenario.name}: killed {killed} times; {trial.states} different folders resumed", flush=True)
    return lost


if __name__ == "__main__":
    sys.exit(main())
