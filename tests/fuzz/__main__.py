"""``python -m tests.fuzz -n 5000 --seed 0``: run programs until the night is over."""

from __future__ import annotations

import argparse
import gc
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.grammar import Program, draw, simpler
from tests.fuzz.program import source
from tests.fuzz.run import Outcome, run


def shrink(program: Program, outcome: Outcome, tries: int, calls: int) -> Program:
    """Leave out features as long as the symptom stays."""
    while tries > 0:
        for smaller in simpler(program):
            tries -= 1
            if run(source(smaller, calls)).symptom == outcome.symptom:
                program = smaller
                break
            if tries <= 0:
                break
        else:
            break
    return program


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("-n", type=int, default=300, help="how many programs")
    parser.add_argument("--calls", type=int, default=3, help="how many steps each takes, at least")
    parser.add_argument("--seed", type=int, default=0, help="the first one's seed")
    parser.add_argument("--codegen", choices=("inductor", "eager", "both"), default="both")
    parser.add_argument("--tries", type=int, default=60, help="programs tried to make a failing one smaller")
    parser.add_argument("--out", type=Path, help="folder for the scripts of failing programs")
    parser.add_argument("--without", default="", help="names of words to leave out, separated by commas")
    args = parser.parse_args()
    without = set(filter(None, args.without.split(",")))
    seen: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    steps = 0
    start = time.monotonic()
    for seed in range(args.seed, args.seed + args.n):
        codegen = ("inductor" if seed % 3 == 0 else "eager") if args.codegen == "both" else args.codegen
        program = draw(seed, codegen, without)
        outcome = run(source(program, args.calls))
        kinds[outcome.kind] += 1
        steps += outcome.steps
        if not outcome.good:
            seen[outcome.symptom] += 1
            print(
                f"\n=== {program.title}\n{outcome.kind}: {outcome.symptom}\n{outcome.detail[-1500:]}",
                flush=True,
            )
            if seen[outcome.symptom] == 1:
                program = shrink(program, outcome, args.tries, args.calls)
                text = source(program, args.calls)
                print(f"--- smaller: {program.title}\n{text}", flush=True)
                if args.out:
                    args.out.mkdir(parents=True, exist_ok=True)
                    (args.out / f"seed_{seed}.py").write_text(f"# {outcome.symptom}\n{text}")
        gc.collect()
        if kinds.total() % 25 == 0:
            print(f"{dict(kinds)}, {steps} steps in {time.monotonic() - start:.0f} s", flush=True)
    print(f"{dict(kinds)}, {steps} steps in {time.monotonic() - start:.0f} s")
    for symptom, count in seen.most_common():
        print(f"{count:5} {symptom}")


if __name__ == "__main__":
    main()
