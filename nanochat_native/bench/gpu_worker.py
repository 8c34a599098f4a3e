"""The process in which `make gpu` times its cases.

It updates the JSON file before and after each case. If the process dies, no result is lost, and the next process
continues after the case at which it died.
"""

import argparse
import faulthandler
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nanochat_native import ops
from nanochat_native.bench import gpu_cases, gpu_clock, results_io
from nanochat_native.bench.gpu_cases import Entry
from nanochat_native.bench.gpu_clock import Ceilings
from nanochat_native.bench.measure import UnavailableError

CASE_SECONDS = 100  # limit of a case; none takes longer, torch.compile's minute included
SECONDS_A_CASE = {"cpu": 0.0, "cuda": 0.6}
REPEATS = {"cpu": 3, "cuda": 15}
BROKEN_DEVICE = 3  # exit status
STDERR = 2


def done(result: dict[str, Any]) -> set[str]:
    """Return the titles of the cases that have an outcome."""
    return {one["title"] for kind in ("rows", "skipped", "errors") for one in result[kind]}


def run_entry(entry: Entry, target: torch.device, ceilings: Ceilings) -> tuple[str, dict[str, Any]]:
    """Run a case. Returns the list of the result that the outcome belongs to, and the outcome."""
    for operator in entry.operators:
        backend, why = ops.serves(operator, target)
        if backend != "native":
            return "skipped", {"title": entry.title, "why": f"{operator} is not native: {why}"}
    seconds, repeats = SECONDS_A_CASE[target.type], REPEATS[target.type]
    try:
        case = entry.make(device=target)
        row = gpu_clock.run(case, ceilings, target, seconds=seconds, repeats=repeats)
    except UnavailableError as error:
        return "skipped", {"title": entry.title, "why": str(error)}
    except AssertionError as error:
        return "errors", {"title": entry.title, "error": f"WRONG, not timed: {error}"}
    except Exception as error:  # any error: the other cases must run
        return "errors", {"title": entry.title, "error": f"{type(error).__name__}: {error}"}
    return "rows", {"title": entry.title, **row}


def accepts_work(target: torch.device) -> bool:
    """Return whether the device still accepts work: after an illegal access every later call of the process fails."""
    if target.type == "cpu":
        return True
    try:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def run(path: Path, target: torch.device, *, quick: bool, only: str, seconds: float, begin: float | None = None) -> int:
    """Run the cases without an outcome for up to `seconds`; begin none after `begin` seconds.

    Returns the exit status of the process.
    """
    started_at = time.monotonic()
    end = started_at + seconds
    result = results_io.load(path)
    selected = [entry for entry in gpu_cases.entries(target.type, quick=quick) if only in entry.title]
    result["cases"] = [entry.title for entry in selected]
    results_io.save(path, result)
    if target.type == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device", file=sys.stderr)
        return BROKEN_DEVICE
    torch.manual_seed(0)
    ceilings = gpu_clock.measure_ceilings(target)
    result["limits"], result["machine"] = vars(ceilings), gpu_clock.machine(target)
    for entry in selected:
        if entry.title in done(result):
            continue
        left = end - time.monotonic()
        if left < 1 or (begin is not None and time.monotonic() - started_at > begin):
            break
        result["running"] = entry.title
        results_io.save(path, result)
        faulthandler.dump_traceback_later(min(CASE_SECONDS, left), exit=True, file=STDERR)
        started = time.monotonic()
        kind, outcome = run_entry(entry, target, ceilings)
        faulthandler.cancel_dump_traceback_later()
        result[kind].append(outcome)
        del result["running"]
        results_io.save(path, result)
        what = outcome.get("why") or outcome.get("error") or "timed"
        print(f"{time.monotonic() - started:6.1f} s  {entry.title}: {what}", flush=True)
        if not accepts_work(target):
            print("the device accepts no more work from this process", file=sys.stderr)
            return BROKEN_DEVICE
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nanochat_native.bench.gpu_worker", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--begin", type=float)
    options = parser.parse_args()
    target = torch.device(options.device)
    limits = {"seconds": options.seconds, "begin": options.begin}
    return run(options.json, target, quick=options.quick, only=options.only, **limits)


if __name__ == "__main__":
    sys.exit(main())
