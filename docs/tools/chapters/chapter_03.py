"""Results and figures of chapter 3, tokens."""

from __future__ import annotations

import json
import tempfile
from typing import Any

import style
from matplotlib.patches import Rectangle

from chapters import Figure, Values, command, demonstration, lab, own, reference, run_module


def two_vocabularies() -> Values:
    """Train d2 with vocabularies of 1,024 and 8,192, and measure both on the same text."""
    with tempfile.TemporaryDirectory() as folder:
        for size in (1024, 8192):
            run_module(f"train {TWO_RUNS} --vocab-size {size} --out-dir {folder} --run v{size}")
        printed = run_module(f"evaluate --checkpoint {folder}/v1024 --compare {folder}/v8192 --json")
    record = json.loads(printed)
    pair = {"v1024": record, "v8192": record["compare"]}
    kept = ("bpb", "loss", "targets", "bytes")
    found: Values = {name: {key: one[key] for key in kept} for name, one in pair.items()}
    for one in found.values():
        one["bytes_per_token"] = one["bytes"] / one["targets"]
    return found


def last_values(record: Values) -> Values:
    """Return the last bits per byte of each run of a comparison, by case, and their mean."""
    finals: dict[str, list[float]] = {}
    for run in record["runs"]:
        finals.setdefault(f"v{run['case']}", []).append(run["curve"][-1]["value"])
    return {name: {"runs": values, "mean": sum(values) / len(values)} for name, values in finals.items()}


TWO_RUNS = "--depth 2 --num-iterations 300 --sample-every 0"
RESULTS = {
    "merges_by_hand": demonstration("merges-by-hand"),
    "same_merges": demonstration("same-merges"),
    "split_pattern": demonstration("split-pattern", trained=True),  # Python's version decides its text
    "special_tokens": demonstration("special-tokens"),
    "vocabulary": demonstration("vocabulary", trained=True),  # likewise
    "pieces": demonstration("pieces", trained=True),
    "pieces_printed": command("demonstrate pieces"),
    "two_vocabularies": own("evaluate --checkpoint runs/v1024 --compare runs/v8192", two_vocabularies),
    "equal_text": lab(
        'compare --recipe october --cases "1024: --vocab-size 1024 --num-iterations 300" '
        '"8192: --vocab-size 8192 --num-iterations 200" --rates 1',
        keep=last_values,
    ),
    "bits_per_byte": demonstration("bits-per-byte", trained=True),
}
REFERENCES = {
    "1508.07909": reference(
        "Sennrich, Haddow and Birch", "Neural Machine Translation of Rare Words with Subword Units", 2016
    ),
}

FILLS = ("#cfe4f3", "#f9d9c4", "#cdebdf", "#f3dbe6", "#fbe6bd", "#dbeefb")
MONOSPACE = {"family": "DejaVu Sans Mono"}


def letters_box(axes: Any, x: float, y: float, text: str, width: float, fill: str) -> float:
    """Draw a token with its lower left corner at (x, y), `width` for each letter, and return its right end."""
    right = x + width * len(text)
    corner, size = (x + 0.012, y), (right - x - 0.024, 0.27)
    axes.add_patch(Rectangle(corner, *size, facecolor=fill, edgecolor="#777777", linewidth=0.5))
    axes.text((x + right) / 2, y + 0.125, text, ha="center", va="center", fontsize=9, **MONOSPACE)
    return right


def draw_merges(values: Values) -> Any:
    """Draw the text after each merge, a row each."""
    figure, axes = style.new_diagram(7.0, 3.1)
    rows = len(values["tokens"])
    axes.text(0.1, 2.92, "merge", fontsize=8.5, color=style.COLORS["gray"], va="center")
    axes.text(1.35, 2.92, "text, cut into tokens", fontsize=8.5, color=style.COLORS["gray"], va="center")
    axes.text(6.9, 2.92, "tokens", fontsize=8.5, color=style.COLORS["gray"], ha="right", va="center")
    for row in range(rows):
        y = 2.45 - 0.385 * row
        if row:
            left, right = values["merges"][row - 1].split("+")
            label = f"{row}.  {left} + {right}"
        else:
            label = "bytes"
        axes.text(0.1, y + 0.13, label, fontsize=9, va="center", **MONOSPACE)
        new = values["merges"][row - 1].replace("+", "") if row else None
        x = 1.35
        for word in values["after"][str(row)].split(" | "):
            for token in word.split(" "):
                fill = FILLS[1] if token == new else FILLS[0] if len(token) > 1 else "#ffffff"
                x = letters_box(axes, x, y, token, 0.178, fill)
            x += 0.07
        axes.text(6.82, y + 0.13, str(values["tokens"][row]), fontsize=9, va="center", ha="right")
    return figure


def draw_line(values: Values) -> Any:
    """Draw a line of code with a color for each token and its id, and some phrases."""
    figure, axes = style.new_diagram(7.0, 3.3)

    def heading(x: float, y: float, text: str) -> None:
        axes.text(x, y, text, fontsize=8.5, color=style.COLORS["gray"], va="center")

    heading(0.1, 3.17, f"a line of Python, {values['line_count']} tokens, with their ids")
    tokens, ids = values["line_tokens"].split(" "), values["line_ids"].split(" ")
    for begin, end, y in ((0, 10, 2.72), (10, len(tokens), 2.1)):
        x = 0.1
        for number in range(begin, end):
            right = letters_box(axes, x, y, tokens[number], 0.145, FILLS[number % len(FILLS)])
            axes.text((x + right) / 2, y - 0.11, ids[number], fontsize=8, ha="center", va="center", color="#666666")
            x = max(right, x + 0.075 * len(ids[number])) + 0.05
    columns = (
        (0.1, "one word, three tokens", ("function", "Function", "function_after_space")),
        (2.0, "words and numbers", ("unhappiness", "hello", "number")),
        (4.3, "not in the vocabulary: bytes", ("naive", "mathematics_in_chinese", "smile")),
    )
    for left, title, names in columns:
        heading(left, 1.5, title)
        for row, name in enumerate(names):
            x, y = left, 1.06 - 0.4 * row
            for place, token in enumerate(values["phrases"][name].split(" ")):
                x = letters_box(
                    axes, x, y, token, 0.1 if token[0] == "<" and len(token) == 4 else 0.14, FILLS[place % 6]
                )
    return figure


def draw_vocabulary(values: Values) -> Any:
    """Draw the bytes of a token, and the bits per byte of equally likely ids, against the size of the vocabulary."""
    figure, (left, right) = style.new_figure(7.0, 2.7, ncols=2)
    rows = values["rows"]
    sizes = [row["vocabulary"] for row in rows]
    left.plot(sizes, [row["bytes_per_token"] for row in rows], "o-", markersize=4)
    left.set(ylabel="bytes in a token", ylim=(0, 5))
    for row in rows:
        above = row["vocabulary"] > 300
        left.annotate(
            f"{row['bytes_per_token']:.2f}",
            (row["vocabulary"], row["bytes_per_token"]),
            xytext=(0, 6) if above else (8, -4),
            textcoords="offset points",
            ha="center" if above else "left",
            fontsize=8,
        )
    bits = [row["uniform_bpb"] for row in rows]
    right.plot(sizes, bits, "o-", markersize=4, color=style.COLORS["orange"])
    right.set(ylabel="bits per byte of a model\nthat knows nothing", ylim=(0, 9))
    for row in rows:
        right.annotate(
            f"{row['uniform_bpb']:.2f}",
            (row["vocabulary"], row["uniform_bpb"]),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
        )
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=35)
        axes.set(xlabel="vocabulary V", xlim=(220, 26000))
        axes.minorticks_off()
    return figure


def draw_share(values: Values) -> Any:
    """Draw the share of the parameters that are embeddings, by depth, for two vocabularies."""
    figure, axes = style.new_figure(7.0, 2.6)
    for size, color in ((65536, "orange"), (8192, "blue")):
        rows = [row for name, row in values.items() if name.endswith(f"_v{size}")]
        depths, shares = [row["depth"] for row in rows], [100 * row["embedding_share"] for row in rows]
        axes.plot(depths, shares, "o-", markersize=4, color=style.COLORS[color], label=f"V = {size:,}")
        for depth, share in zip(depths, shares, strict=True):
            axes.annotate(
                f"{share:.0f}%", (depth, share), xytext=(2, 4), textcoords="offset points", ha="left", fontsize=8
            )
    axes.set(xlabel="depth", ylabel="share of the parameters in\nwte and lm_head, %", ylim=(0, 103), xlim=(3, 30.5))
    axes.set_xticks([4, 6, 8, 12, 16, 20, 26])
    style.label_lines(axes, dx=28)
    return figure


FIGURES = {
    "03-merges": Figure(draw_merges, "merges_by_hand"),
    "03-line": Figure(draw_line, "pieces"),
    "03-vocabulary": Figure(draw_vocabulary, "vocabulary"),
    "03-share": Figure(draw_share, "parameters"),
}
