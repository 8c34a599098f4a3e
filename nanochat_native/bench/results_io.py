"""Results of the benchmarks: the JSON file, and each row as text. Needs no torch."""

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any, NoReturn

from nanochat_native.runtime.files import write_atomically

GPU_FACTS = {
    "name": "name",
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "max_sm_mhz": "clocks.max.sm",
    "max_memory_mhz": "clocks.max.mem",
    "celsius": "temperature.gpu",
    "power_limit_watts": "power.limit",
}


class Parser(argparse.ArgumentParser):
    """A parser for commands that must run without tyro. It reports a wrong flag in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def save(path: Path, result: dict[str, Any]) -> None:
    """Write the file atomically: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def commit() -> str:
    """Return the commit of this source tree, or "unknown" outside of a repository."""
    try:
        git = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def gpu_facts() -> dict[str, Any]:
    """Return what nvidia-smi reports of the first GPU now: name, driver, clocks, limits. Empty without nvidia-smi."""
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FACTS.values())}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    return {name: _number(value) for name, value in zip(GPU_FACTS, values, strict=False)}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def table_parts(row: dict[str, Any]) -> list[str]:
    """Return the case with its times and ratio, followed by a phrase for each other figure of the row."""
    ours, theirs = f"{row['ours_ms']:>9.2f} ms", "        - ms"
    ratio = "     -"
    if row["theirs_ms"] is not None:
        theirs, ratio = f"{row['theirs_ms']:>9.2f} ms", f"{row['ratio']:>6.2f}x"
    min_speedup = f"(min {row['floor']:.2f}x)" if row["floor"] else " " * 11
    parts = [f"{row['group']:<23} {row['case']:<42} {ours} {theirs} {ratio}  {min_speedup}  {row['opponent']:<24}"]
    for share, name in (("share_of_sgemm", "torch.mm"), ("share_of_product", "bfloat16 torch.mm")):
        if share in row:
            parts.append(f"{row['gflops']:.0f} GFLOP/s, {row[share]:.0%} of {name}")
    if "share_of_copy" in row:
        parts.append(f"{row['gbytes']:.1f} GB/s, {row['share_of_copy']:.0%} of copy")
    if "ours_tokens_per_second" in row:
        parts.append(f"{row['ours_tokens_per_second']:,.0f} against {row['theirs_tokens_per_second']:,.0f} tokens/s,")
    if "ours_first_ms" in row:
        parts.append(f"first token {row['ours_first_ms']:.1f} against {row['theirs_first_ms']:.1f} ms,")
    for name, unit, scale in (("peak_bytes", "MB", 1e6), ("launches", "launches", 1), ("host_ms", "ms of host", 1)):
        ours_value, theirs_value = row.get(f"ours_{name}"), row.get(f"theirs_{name}")
        if ours_value is not None:
            digits = ".2f" if name == "host_ms" else ",.0f"
            against = "-" if theirs_value is None else f"{theirs_value / scale:{digits}}"
            label = "peak " if name == "peak_bytes" else ""
            parts.append(f"{label}{ours_value / scale:{digits}} against {against} {unit}")
    if row.get("note"):
        parts.append(f"[{row['note']}]")
    return parts
