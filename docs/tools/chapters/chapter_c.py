"""The figure of appendix C, how the guide is kept true."""

import style
from matplotlib.patches import Rectangle

from chapters import Figure

# For each row: what the program has, the file that is committed, what the text shows, and what the test does.
ROWS = (
    ("source code", "", "quoted code", "compared with the source"),
    ("commands,\ndemonstrations", "docs/results", "numbers, output", "computed again"),
    ("figure functions", "docs/guide/figures", "figures", "drawn again, same bytes"),
    ("exercises,\nknown mistakes", "exercises.json", "answers", "checked against each other"),
)


def draw_flow():
    """Draw where the parts of a chapter come from, and what the tests compare."""
    figure, axes = style.new_diagram(7.0, 3.5)
    gray = style.COLORS["gray"]
    high, left, middle, text, out = 0.46, 0.05, 1.75, 3.5, 5.75
    for x, width, head in (
        (left, 1.25, "the program"),
        (middle, 1.4, "committed"),
        (text, 1.35, "a chapter"),
        (out, 1.2, "built"),
    ):
        axes.text(x + width / 2, 3.33, head, ha="center", va="center", fontsize=9, color=gray)
    axes.add_patch(Rectangle((text - 0.08, 0.12), 1.51, 3.06, fill=False, linestyle=(0, (4, 3)), color=gray))
    for number, (source, file, shown, check) in enumerate(ROWS):
        y = 2.62 - 0.78 * number
        style.box(axes, left, y, 1.25, high, source, facecolor="#e8f2f9", edgecolor=gray)
        style.box(axes, text, y, 1.35, high, shown, edgecolor=gray)
        if file:
            style.box(axes, middle, y, 1.4, high, file, edgecolor=gray)
            style.arrow(axes, (left + 1.25, y + high / 2), (middle, y + high / 2))
            style.arrow(axes, (middle + 1.4, y + high / 2), (text, y + high / 2))
        else:
            style.arrow(axes, (left + 1.25, y + high / 2), (text, y + high / 2))
        below = y - 0.11 if file else y + 0.1
        axes.text(middle + 0.7, below, check, ha="center", va="center", fontsize=8, color=style.COLORS["orange"])
    style.arrow(axes, (middle + 0.12, 1.84), (middle + 0.12, 1.06 + high))
    built = ("web pages", "PDF", "notebooks")
    checks = ("opened without\na network", "outline compared", "run")
    for number, (name, check) in enumerate(zip(built, checks, strict=True)):
        y = 2.3 - 0.85 * number
        style.box(axes, out, y, 1.2, high, name, edgecolor=gray)
        style.arrow(axes, (text + 1.43, 1.65), (out, y + high / 2))
        axes.text(out + 0.6, y - 0.06, check, ha="center", va="top", fontsize=8, color=style.COLORS["orange"])
    return figure


FIGURES = {"c-kept-true": Figure(draw_flow)}
