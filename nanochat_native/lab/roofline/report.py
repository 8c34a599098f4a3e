"""Print, write and draw the figures of the roofline command."""

import json
from pathlib import Path
from typing import Any

from nanochat_native.lab.roofline.analysis import ELSE, GROUPS, analyse
from nanochat_native.lab.roofline.measurement import measure, names_of
from nanochat_native.lab.roofline.options import Options, check, machine_of, model_config
from nanochat_native.lab.roofline.recording import record
from nanochat_native.lab.roofline.text import lines_of, short_name
from nanochat_native.runs import pictures
from nanochat_native.runtime.files import write_atomically

FORMAT = "nanochat-native roofline"


def run(options: Options) -> None:
    """Record a step, and print its table, write it as JSON and draw it as the options ask.

    Raises:
        ValueError: for a flag out of range, or if the operations do not add up.
        ImportError: --plot without matplotlib.
        OSError: a file cannot be written.
    """
    check(options)
    figure = None if options.plot is None else pictures.new_figure(9, 6)
    if options.plot is not None and figure is None:
        raise ImportError("matplotlib is not installed: pip install matplotlib")
    machine, config = machine_of(options), model_config(options)
    step = (config, options.device_batch_size, options.torch_dtype, options.optimizer, options.accumulate)
    flags = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    result = {"format": FORMAT, "command": "roofline", "options": flags, **analyse(record(*step), machine)}
    if options.measure:
        result["measured"] = measure(*step, names_of(result))
    text = json.dumps(result, indent=1) + "\n"
    if options.json == "-":
        print(text, end="")
    else:
        print("\n".join(lines_of(result)))
    if options.json not in (None, "-"):
        write_atomically(Path(str(options.json)), text)
    if options.plot is not None:
        draw(figure, result)
        pictures.save(figure, options.plot)


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Draw the modelled time of each operator of the micro-step, and the measured time if there is one."""
    axes = figure.add_subplot()
    rows = result["micro_step"]["rows"][::-1]
    for group, color in zip(GROUPS, ("tab:blue", "tab:orange"), strict=True):
        heights = [row["ms"] if (row["group"] == ELSE) == (group == ELSE) else 0.0 for row in rows]
        axes.barh([short_name(row["operator"]) for row in rows], heights, color=color, label=group)
    if "measured" in result:
        times = result["measured"]["micro_step"]
        axes.plot([times.get(row["operator"], 0.0) for row in rows], range(len(rows)), "k|", label="measured")
    sums = {f"{ELSE}, in all": result["micro_step"][ELSE]["ms"], "its floor": result["floor"]["ms"]}
    axes.barh(list(sums), list(sums.values()), color="tab:gray")
    axes.set(
        xlabel="ms of a micro-step, at best", title=f"{result['machine']['name']}, depth {result['options']['depth']}"
    )
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize="small")
