"""nanochat-native SUBCOMMAND ...: every command of the package under one name.

`nanochat-native SUBCOMMAND FLAGS` does what `python -m nanochat_native.SUBCOMMAND FLAGS` does, with the same exit code.
This module must start fast, so torch is imported only when a subcommand that needs it runs.
"""

import runpy
import sys
from collections.abc import Sequence

import nanochat_native

# The subcommands by group, each with a line of help. A subcommand is named as its module, with hyphens for underscores.
GROUPS = {
    "Train": {
        "speedrun": "make a chat model stage by stage, with a report card",
        "download": "download datasets",
        "train": "train a GPT",
        "finetune": "fine-tune a trained model on conversations",
        "reinforce": "train a fine-tuned model by rewards for its answers",
    },
    "Use a model": {
        "generate": "continue a prompt",
        "chat": "chat in the terminal",
        "serve": "serve an OpenAI-compatible API and a chat page over HTTP",
    },
    "Evaluate": {
        "evaluate": "measure bits per byte and the CORE score",
        "chat-eval": "measure a chat model in nanochat's tasks, and its ChatCORE",
        "lm-eval-adapter": "run EleutherAI's lm-evaluation-harness",
    },
    "Experiments": {
        "lr-find": "find a learning rate with a range test",
        "batch-size": "measure the gradient noise scale, to choose a batch size",
        "compare": "compare optimizers, each at its best learning rate",
        "scaling": "measure scaling laws: several depths, the best size for a budget",
        "schedules": "show learning-rate and momentum schedules",
        "memory": "predict and measure the memory of a training step",
        "roofline": "model the time of a training step on a GPU by operator",
        "demonstrate": "show with numbers what the guide says",
        "plot": "redraw the pictures of a run or an experiment",
    },
    "Learn": {
        "guide": "show the exercises of the guide and check their answers",
    },
    "Interchange": {
        "export": "export a model to transformers or safetensors",
        "import-checkpoint": "import a checkpoint of nanochat or transformers",
    },
    "System": {
        "doctor": "check the installation and every native operator",
        "bench": "benchmark the CPU operators, a training step and generation",
        "bench.gpu": "build, test and benchmark the CUDA kernels",
        "bench.load": "load-test the server with many clients",
        "completion": "print a completion script for bash, zsh or fish",
    },
}
SUBCOMMANDS = {name: summary for group in GROUPS.values() for name, summary in group.items()}
USAGE = """usage: nanochat-native SUBCOMMAND [FLAGS]
       nanochat-native SUBCOMMAND --help"""
OPTIONS = {"-h, --help": "show this message and exit", "--version": "show the version and exit"}


def help_text() -> str:
    """Return the help: the usage, and the subcommands in their groups with one line each."""
    width = max(map(len, SUBCOMMANDS)) + 2
    sections = [f"{USAGE}\n\nTrain nanochat-style GPTs on hand-written CPU and CUDA kernels."]
    for title, entries in {**GROUPS, "Options": OPTIONS}.items():
        sections.append("\n".join([f"{title}:", *(f"  {name:<{width}}{text}" for name, text in entries.items())]))
    return "\n\n".join(sections)


def module_of(subcommand: str) -> str:
    """Return the module that a subcommand runs: lr-find -> nanochat_native.lr_find."""
    return f"nanochat_native.{subcommand.replace('-', '_')}"


def unknown_subcommand(name: str) -> str:
    """Return a one-line error for an unknown subcommand, with the nearest name if one is similar."""
    if name.startswith("-"):
        return f"unrecognized option {name!r} before the subcommand; nanochat-native --help lists the subcommands"
    import difflib  # here, because only an error needs it

    near = difflib.get_close_matches(name.replace("_", "-"), SUBCOMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "nanochat-native --help lists the subcommands"
    return f"unknown subcommand {name!r}; {hint}"


def main(args: Sequence[str] | None = None) -> int:
    """Run the subcommand that `args` or sys.argv names. Return the exit code. A subcommand may raise SystemExit."""
    given = sys.argv[1:] if args is None else list(args)
    if not given or given[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if given[0] == "--version":
        print(f"nanochat-native {nanochat_native.__version__}")
        return 0
    if given[0].replace("_", "-") not in SUBCOMMANDS:
        print(f"error: {unknown_subcommand(given[0])}", file=sys.stderr)
        return 2
    sys.argv[1:] = given[1:]
    runpy.run_module(module_of(given[0]), run_name="__main__", alter_sys=True)  # sets sys.argv[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
