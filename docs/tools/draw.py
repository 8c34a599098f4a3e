"""Draw the figures of the guide from docs/results: docs/guide/figures/NAME.svg.

python docs/tools/draw.py             # all of them
python docs/tools/draw.py NAME ...    # these
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import chapters


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the figures of the guide.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures to draw, default all")
    options = parser.parse_args(args)
    known = chapters.merged("figures")
    unknown = [name for name in options.names if name not in known]
    if unknown:
        print(f"error: a figure must be one of {', '.join(sorted(known))}, got {unknown[0]}", file=sys.stderr)
        return 2
    chapters.FIGURES_FOLDER.mkdir(parents=True, exist_ok=True)
    for name in options.names or known:
        content = chapters.draw(known[name])
        (chapters.FIGURES_FOLDER / f"{name}.svg").write_bytes(content)
        print(f"{name:<32}{len(content) / 1000:>7.1f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
