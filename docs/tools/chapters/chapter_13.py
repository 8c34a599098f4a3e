"""Results and figures of chapter 13, using the model and finding faults."""

from __future__ import annotations

import re
from typing import Any

import style

from chapters import Figure, Values, command, demonstration, lab, own, reference, run_module

COLORS = style.COLORS
LINE_WIDTH = 6.7  # inches of the boxes of a row of tokens


def finetune() -> Values:
    """Fine-tune the run d4. Return the validation losses by step, and the printed output without the lines of steps."""
    return without_steps(run_module("finetune --checkpoint runs/d4 --overwrite"))


def without_steps(output: str) -> Values:
    kept = [line for line in output.splitlines() if " | mfu " not in line]
    text = "\n".join(kept) + "\n"
    found = re.findall(r"^step (\d+): validation ([\d.]+) bits", text, re.M)
    bits = [float(value) for _, value in found]
    return {"steps": [int(step) for step, _ in found], "bpb": bits, "first": bits[0], "last": bits[-1], "output": text}


def faults() -> Values:
    from nanochat_native.demonstrations import find

    return find("faults")()


RESULTS = {
    "faults": own("python -m nanochat_native.demonstrate faults", faults),
    "temperature": demonstration("temperature", trained=True),
    "kv_cache": demonstration("kv-cache", timed=True),
    "loss_mask": demonstration("loss-mask", trained=True),
    "chat_answers": demonstration("chat-answers", trained=True),
    "core_toy": demonstration("core", trained=True),
    "generate_init": command('generate --checkpoint runs/d4 --prompt "def __init__(self" --max-tokens 40 --seed 1'),
    "generate_greedy": command(
        'generate --checkpoint runs/d4 --prompt "def __init__(self" --max-tokens 40 --temperature 0'
    ),
    "evaluate_chat": lab("evaluate --checkpoint runs/d4-chat --compare runs/d4 --data stdlib --max-tokens 32768"),
    "finetune_d4": own("python -m nanochat_native.finetune --checkpoint runs/d4", finetune),
}


def visible(token: str) -> str:
    """Return a token with its spaces and line ends made visible."""
    return token.replace(" ", "\u2423").replace("\n", "\u21b5") or "\u2205"


def draw_sampling(found: Values) -> Any:
    """Draw the distribution of one next token at three temperatures, and with top-k."""
    panels = [
        (f"temperature {found[key]['temperature']:g}", found[key]["probabilities"]) for key in ("t5", "t10", "t20")
    ]
    panels.append((f"top-k {found['top_k']['k']}", found["top_k"]["probabilities"]))
    figure, axes = style.new_figure(7.0, 3.1, ncols=4, sharex=True, sharey=True)
    rows = range(len(found["tokens"]))
    for panel, (title, probabilities) in zip(axes, panels, strict=True):
        color = COLORS["orange"] if "top-k" in title else COLORS["blue"]
        panel.plot(probabilities, range(len(probabilities)), "o", color=color, markersize=4)
        panel.set(xlim=(2e-5, 2), ylim=(len(rows) - 0.4, -0.6))
        panel.set_xscale("log")
        panel.set_xticks((1e-4, 1e-2, 1), ("0.0001", "0.01", "1"))
        panel.minorticks_off()
        panel.set_title(title, fontsize=9)
    axes[0].set_yticks(rows, [visible(token) for token in found["tokens"]], family="DejaVu Sans Mono", fontsize=8.5)
    figure.supxlabel("probability of the token", fontsize=9)
    return figure


def draw_cache(found: Values) -> Any:
    """Draw the time of one more token with and without a cache, against the length of the text."""
    figure, axes = style.new_figure(7.0, 2.9)
    lengths = [row["tokens"] for row in found["rows"]]
    for key, label, color in (
        ("again_ms", "all tokens again", COLORS["orange"]),
        ("cached_ms", "with the cache", COLORS["blue"]),
    ):
        axes.plot(lengths, [row[key] for row in found["rows"]], "o-", color=color, label=label, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_yticks((1, 10, 100), ("1", "10", "100"))
    axes.minorticks_off()
    axes.set(
        xlabel="tokens in the text",
        ylabel="ms for one more token",
        xlim=(lengths[0] * 0.9, lengths[-1] * 1.05),
        ylim=(0.5, 100),
    )
    style.label_lines(axes)
    return figure


def draw_mask(found: Values) -> Any:
    """Draw the tokens of a conversation, those in color that the loss counts."""
    per_character, padding, height, gap = 0.072, 0.09, 0.24, 0.04
    boxes, x, row = [], 0.0, 0
    for token, special, target in zip(found["tokens"], found["special"], found["is_target"], strict=True):
        width = len(token) * per_character + padding
        if (token == "<|user_start|>" and boxes) or x + width > LINE_WIDTH:
            x, row = 0.0, row + 1
        boxes.append((x, row, width, token, special, target))
        x += width + gap
    total = (row + 1) * (height + 0.12) + 0.45
    figure, axes = style.new_diagram(7.0, total)
    colors = {True: COLORS["orange"], False: COLORS["light"]}
    for x, row, width, token, special, target in boxes:
        bottom = total - 0.1 - height - row * (height + 0.12)
        style.box(
            axes,
            0.15 + x,
            bottom,
            width,
            height,
            visible(token),
            facecolor=colors[target],
            edgecolor=COLORS["black"] if special else "none",
            fontsize=8,
            textcolor="white" if target else COLORS["black"],
        )
    for place, target, text in ((0.15, True, "the loss counts it"), (2.2, False, "read, not counted")):
        style.box(axes, place, 0.12, 0.3, 0.18, facecolor=colors[target], edgecolor="none")
        axes.text(place + 0.38, 0.21, text, va="center", fontsize=8.5)
    axes.text(4.2, 0.21, "framed: a special token", va="center", fontsize=8.5)
    return figure


def draw_faults(found: Values) -> Any:
    """Draw the loss curve of each fault beside the healthy one."""
    figure, axes = style.new_figure(7.0, 6.4, nrows=4, ncols=3, sharex=True, sharey=True)
    steps = range(1, found["steps"] + 1)
    for panel, each in zip(axes.flat, found["faults"].values(), strict=True):
        seen = each["seen_in_the_curve"] == "yes"
        color = COLORS["orange"] if seen else COLORS["blue"]
        panel.plot(steps, found["healthy"]["losses"], color=COLORS["gray"], linewidth=2.6, alpha=0.6)
        losses = [float("nan") if loss is None else loss for loss in each["run"]["losses"]]
        panel.plot(steps, losses, color=color, linewidth=1.2)
        panel.set_title(each["fault"], fontsize=9)
        text = "in the spread"
        if seen:
            text = "NaN" if each["final"] is None else f"{each['final'] - each['healthy_final']:+.2f}"
        panel.text(39.5, 9.2, text, ha="right", fontsize=8.5, color=color)
        panel.set(ylim=(0, 10.3), xlim=(0, 41), xticks=(0, 20, 40), yticks=(0, 5, 10))
        panel.grid(visible=False)
        panel.label_outer(remove_inner_ticks=True)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("training loss, nats a token", fontsize=9)
    return figure


FIGURES = {
    "13-sampling": Figure(draw_sampling, "temperature"),
    "13-cache": Figure(draw_cache, "kv_cache"),
    "13-mask": Figure(draw_mask, "loss_mask"),
    "13-faults": Figure(draw_faults, "faults"),
}
REFERENCES = {
    "1904.09751": reference("Holtzman et al.", "The Curious Case of Neural Text Degeneration", 2019),
    "2406.11794": reference(
        "Li et al.", "DataComp-LM: In search of the next generation of training sets for language models", 2024
    ),
}
