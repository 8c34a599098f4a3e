"""python -m nanochat_native.download: download datasets, those of nanochat by name."""

import sys
from collections.abc import Sequence
from pathlib import Path

from nanochat_native.data.downloads import (
    DATASETS,
    Options,
    check_space,
    download,
    find_dataset,
    in_units,
    make_plan,
    read_list,
    verify,
)
from nanochat_native.runtime.command import run_command
from nanochat_native.runtime.errors import ConfigError


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show_datasets(out: Path) -> None:
    """Print the names, what they are, and what of them is there."""
    for dataset in DATASETS:
        there = read_list(out / dataset.name)
        size = in_units(sum(entry["size"] for entry in there.values()))
        state = f"{len(there):,} files, {size}, in {out / dataset.name}" if there else "not there"
        print(f"{dataset.name:<12} {dataset.about} ({dataset.repo}): {state}")


def check_offline(options: Options) -> None:
    """Check what was downloaded. Raises ConfigError for a dataset that is not there as it came."""
    for name in options.datasets:
        dataset = find_dataset(name)
        damaged = verify(dataset, options.out)
        if damaged:
            more = f" and {len(damaged) - 1:,} more" if len(damaged) > 1 else ""
            raise ConfigError(f"{options.out / dataset.name}: {damaged[0]}{more} is missing or damaged")
        print(f"{dataset.name}: {len(read_list(options.out / dataset.name)):,} files are there and right")


def run(options: Options) -> None:
    """Download, check or list. Raises the errors of data.downloads, and ConfigError for flags that do not fit."""
    if options.shards is not None and options.shards < 1:
        raise ConfigError(f"--shards must be a whole number >= 1, got {options.shards}")
    if not options.datasets:
        show_datasets(options.out)
        return
    if options.offline:
        check_offline(options)
        return
    datasets = [find_dataset(name) for name in dict.fromkeys(options.datasets)]
    plans = [
        make_plan(dataset, options.out, note, patterns=options.files, shards=options.shards) for dataset in datasets
    ]
    for plan in plans:
        there = f", {len(plan.files) - len(plan.missing):,} are there" if len(plan.missing) < len(plan.files) else ""
        print(
            f"{plan.dataset.name:<12} {len(plan.files):,} files of {plan.dataset.repo}{there}; "
            f"{in_units(plan.missing_bytes)} to download to {plan.folder}",
            flush=True,
        )
    if not any(plan.missing for plan in plans):
        return
    check_space(plans)
    if not options.yes:
        if not sys.stdin.isatty():
            raise ConfigError("there is no terminal to ask on: give --yes to download")
        try:
            answer = input("Download? [y/N] ")
        except EOFError:  # Ctrl-D
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            return
    for plan in plans:
        download(plan, note)
        print(f"{plan.dataset.name:<12} {len(plan.files):,} files are in {plan.folder}", flush=True)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code."""
    return run_command(Options, "download", args, run)


if __name__ == "__main__":
    sys.exit(main())
