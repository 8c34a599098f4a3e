"""Compute the results that the guide cites: docs/results/NAME.json.

python docs/tools/measure.py             # all of them; needs runs/d4, which train_d4 leaves
python docs/tools/measure.py NAME ...    # these
python docs/tools/measure.py --list      # their names and commands
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import chapters

from nanochat_native.runtime.files import write_atomically


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compute the results that the guide cites.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="results to compute, default all")
    parser.add_argument("--list", action="store_true", help="print the names and the commands")
    options = parser.parse_args(args)
    known = chapters.merged("results")
    unknown = [name for name in options.names if name not in known]
    if unknown:
        print(f"error: a result must be one of {', '.join(sorted(known))}, got {unknown[0]}", file=sys.stderr)
        return 2
    for name in options.names or known:
        if options.list:
            print(f"{name:<24}{known[name].command}")
            continue
        start = time.perf_counter()
        values = known[name].compute()
        write_atomically(chapters.RESULTS_FOLDER / f"{name}.json", chapters.to_text(values))
        print(f"{name:<24}{time.perf_counter() - start:>7.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
