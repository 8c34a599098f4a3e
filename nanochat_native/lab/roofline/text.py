"""The figures of a step as lines of text."""

from typing import Any

from nanochat_native.lab.roofline.analysis import ELSE, GROUPS
from nanochat_native.lab.roofline.measurement import OTHER

WIDTH = 38  # of the column of names


def lines_of(result: dict[str, Any]) -> list[str]:
    """Return the lines of the tables and of the summary."""
    options, machine = result["options"], result["machine"]
    micro_step, phase = result["micro_step"], result["optimizers"]
    measured = result.get("measured", {})
    rates = f"{machine['flops'] / 1e12:,.0f} TFLOP/s, {machine['bandwidth'] / 1e12:.3g} TB/s"
    lines = [
        f"depth {options['depth']}, {options['device_batch_size']} x {options['max_seq_len']} tokens, vocabulary "
        f"{options['vocab_size']} | {options['dtype']} | {options['optimizer']} | {machine['name']}: {rates}, "
        f"{1e6 * machine['launch']:.3g} us a launch",
        "",
        _heading("micro-step", bool(measured)),
    ]
    times = measured.get("micro_step")
    for group in GROUPS:
        rows = [row for row in micro_step["rows"] if (row["group"] == ELSE) == (group == ELSE)]
        lines.append(group)
        lines += [_line(f"  {short_name(row['operator'])}", row, times, row["operator"]) for row in rows]
        lines.append(_line("  in all", micro_step[group], times, *(row["operator"] for row in rows)))
    lines += _totals(micro_step["all"], times)
    times = measured.get("optimizers")
    lines.append(_heading("clipping and optimizers", bool(measured)))
    lines += [_line(f"  {short_name(row['operator'])}", row, times, row["operator"]) for row in phase["rows"]]
    lines += _totals(phase["all"], times)
    mfu = "MFU not known" if result["mfu"] is None else f"MFU {result['mfu']:.3f}"
    whole, floor = micro_step["all"], result["floor"]
    lines.append(
        f"micro-step: {whole['ms']:.1f} ms, {result['tokens_per_second']:,.0f} tokens/s, {mfu}, "
        f"{whole['calls']:,} operator calls, {whole['launches']:,} launches"
    )
    lines.append(
        f"{ELSE}: {micro_step[ELSE]['ms']:.1f} ms; the floor, one pass between products over "
        f"{floor['bytes'] / 1e9:.1f} GB: {floor['ms']:.1f} ms"
    )
    waits = phase["waits"] + micro_step["waits"] + 1
    phase_ms = phase["all"]["ms"]
    lines.append(
        f"clipping and optimizers: {phase_ms:.1f} ms; waits of the host in a step: {waits}, to read loss and norm"
    )
    return lines


def short_name(operator: str) -> str:
    return operator.removeprefix("aten::").removeprefix("nanochat_native::")


def _totals(row: dict[str, Any], measured: dict[str, float] | None) -> list[str]:
    """Return the last lines of a phase: the measured time of operators that are not modelled, and the sums."""
    if measured is None:
        return [_line("in all", row, None), ""]
    return [f"{OTHER:<{WIDTH + 46}}{measured[OTHER]:>10.3f}", _line("in all", row, measured, *measured), ""]


def _heading(name: str, with_measured: bool) -> str:
    columns = f"{name:<{WIDTH}}{'calls':>8}{'launches':>10}{'GB':>9}{'TFLOP':>9}{'ms':>10}"
    return columns + (f"{'measured':>10}" if with_measured else "")


def _line(name: str, row: dict[str, Any], measured: dict[str, float] | None, *operators: str) -> str:
    gigabytes = (row["read"] + row["written"]) / 1e9
    line = f"{name:<{WIDTH}}{row['calls']:>8,}{row['launches']:>10,}{gigabytes:>9.2f}{row['flops'] / 1e12:>9.2f}"
    line += f"{row['ms']:>10.3f}"
    return line if measured is None else line + f"{sum(measured.get(name, 0.0) for name in operators):>10.3f}"
