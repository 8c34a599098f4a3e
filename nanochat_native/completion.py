"""nanochat-native completion SHELL: print a completion script for the nanochat-native command.

    eval "$(nanochat-native completion bash)"          # in ~/.bashrc
    source <(nanochat-native completion zsh)           # in ~/.zshrc, after compinit
    nanochat-native completion fish | source           # in ~/.config/fish/config.fish

The flags are read from the source code of the commands, because importing the commands would take seconds.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nanochat_native.__main__ import OPTIONS, SUBCOMMANDS
from nanochat_native.runtime import declared_flags
from nanochat_native.runtime.declared_flags import Flag

PACKAGE = Path(__file__).resolve().parent
# The classes whose fields are the flags of a subcommand, as "file:class". A file without a class uses add_argument.
TRAIN = "runs/config.py:TrainConfig"
FLAGS = {
    "speedrun": ["pipeline/session.py:Options"],
    "download": ["data/downloads.py:Options"],
    "train": [TRAIN],
    "finetune": ["runs/config.py:FinetuneConfig"],
    "reinforce": ["runs/config.py:ReinforceConfig"],
    "generate": ["generate.py:Options"],
    "chat": ["inference/chat_session.py:Options"],
    "serve": ["serve.py:Options"],
    "evaluate": ["evaluation/session.py:Options"],
    "chat-eval": ["evaluation/chat_evaluation.py:Options"],
    "lm-eval-adapter": [],  # its flags belong to lm-eval
    "lr-find": ["lab/range_test.py:Options", TRAIN],
    "batch-size": ["lab/noise_scale.py:Options", TRAIN],
    "compare": ["lab/comparison.py:Options", TRAIN],
    "scaling": ["lab/scaling/plan.py:Options", TRAIN],
    "schedules": ["schedules.py:Options", TRAIN],
    "memory": ["lab/memory/options.py:Options"],
    "roofline": ["lab/roofline/options.py:Options"],
    "demonstrate": ["demonstrate.py:Options"],
    "plot": ["plot.py:Options"],
    "guide": ["guide.py:Options"],
    "export": ["interop/transformers_export.py:Options"],
    "import-checkpoint": ["interop/importing.py:Options"],
    "doctor": ["doctor.py"],
    "bench": ["bench/__main__.py:Options"],
    "bench.gpu": ["bench/gpu.py"],
    "bench.load": ["bench/load.py:Options"],
    "completion": [],
}


def flags_of(subcommand: str) -> list[Flag]:
    """Return the flags of a subcommand, including --help."""
    found = {"--help": Flag("--help", is_switch=True, summary="show the flags and exit")}
    for place in FLAGS[subcommand]:
        file, _, class_name = place.partition(":")
        for flag in declared_flags.read(PACKAGE / file, class_name):
            found.setdefault(flag.name, flag)
    return list(found.values())


def bash() -> str:
    """Return the script for bash."""
    lines = [
        "_nanochat_native() {",
        "    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}",
        "    local subcommand=${COMP_WORDS[1]//_/-}",
        "    COMPREPLY=()",
        "    if ((COMP_CWORD == 1)); then",
        f'        COMPREPLY=($(compgen -W "{" ".join([*SUBCOMMANDS, "--help", "--version"])}" -- "$current"))',
        "        return",
        "    fi",
        '    case "$subcommand $previous" in',
    ]
    lines += [
        f'    "{name} {flag.name}") COMPREPLY=($(compgen -W "{" ".join(flag.choices)}" -- "$current")); return ;;'
        for name in SUBCOMMANDS
        for flag in flags_of(name)
        if flag.choices
    ]
    lines += ["    esac", "    [[ $current == -* || $subcommand == completion ]] || return", "    case $subcommand in"]
    for name in SUBCOMMANDS:
        words = [*(SHELLS if name == "completion" else ()), *(flag.name for flag in flags_of(name))]
        lines.append(f'    {name}) COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$current")) ;;')
    return "\n".join([*lines, "    esac", "}", "complete -o default -F _nanochat_native nanochat-native"])


def zsh() -> str:
    """Return the script for zsh."""

    def quoted(text: str) -> str:
        return "'" + text.replace("'", "'\\''") + "'"

    def escaped(text: str) -> str:
        return re.sub(r"([\[\]:\\])", r"\\\1", text)

    lines = ["#compdef nanochat-native", "_nanochat_native() {", "    local -a subcommands", "    subcommands=("]
    lines += [f"        {quoted(f'{name}:{summary}')}" for name, summary in SUBCOMMANDS.items()]
    lines += [
        "    )",
        "    if ((CURRENT == 2)); then",
        f"        _describe subcommand subcommands || compadd -- {' '.join(option.split()[-1] for option in OPTIONS)}",
        "        return",
        "    fi",
        "    local subcommand=${words[2]//_/-}",
        "    shift words",
        "    ((CURRENT--))",
        "    case $subcommand in",
    ]
    for name in SUBCOMMANDS:
        specs = [
            f"{flag.name}[{escaped(flag.summary)}]"
            + ("" if flag.is_switch else f":value:({' '.join(flag.choices)})" if flag.choices else ":value:_files")
            for flag in flags_of(name)
        ]
        specs.append(f"*:shell:({' '.join(SHELLS)})" if name == "completion" else "*:file:_files")
        lines += [f"    {name})", f"        _arguments {' '.join(map(quoted, specs))} ;;"]
    return "\n".join([*lines, "    esac", "}", "compdef _nanochat_native nanochat-native"])


def fish() -> str:
    """Return the script for fish."""

    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    complete = "complete -c nanochat-native"
    lines = [
        f"{complete} -f -n __fish_use_subcommand -a {name} -d {quoted(summary)}"
        for name, summary in {**SUBCOMMANDS, "--help": OPTIONS["-h, --help"], "--version": OPTIONS["--version"]}.items()
    ]
    for name in SUBCOMMANDS:
        spellings = " ".join(dict.fromkeys([name, name.replace("-", "_")]))
        condition = quoted(f"__fish_seen_subcommand_from {spellings}")
        if name == "completion":
            lines.append(f"{complete} -f -n {condition} -a {quoted(' '.join(SHELLS))}")
        for flag in flags_of(name):
            value = "" if flag.is_switch else f" -x -a {quoted(' '.join(flag.choices))}" if flag.choices else " -r"
            summary = f" -d {quoted(flag.summary)}" if flag.summary else ""
            lines.append(f"{complete} -n {condition} -l {flag.name.removeprefix('--')}{value}{summary}")
    return "\n".join(lines)


SHELLS: dict[str, Callable[[], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def main(args: Sequence[str] | None = None) -> int:
    """Print the script for the shell that `args` or sys.argv names. Return the exit code."""
    given = sys.argv[1:] if args is None else list(args)
    if "--help" in given or "-h" in given:
        print(f"usage: nanochat-native completion {{{','.join(SHELLS)}}}\n\n{__doc__}\noptions:\n  -h, --help")
        return 0
    if len(given) != 1 or given[0] not in SHELLS:
        print(f"error: completion takes one shell: {', '.join(SHELLS)}; got {' '.join(given)!r}", file=sys.stderr)
        return 2
    print(SHELLS[given[0]]())
    return 0


if __name__ == "__main__":
    sys.exit(main())
