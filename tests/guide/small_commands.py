"""The guide's commands at a small size: the same flags, with the sizes of a tiny model."""

import os
import re
import shlex
import sys
from pathlib import Path

import marks
from fork_server import python

# Flags that replace those of a command, by module. A value of True is a switch.
TINY = {"depth": 2, "head_dim": 32, "max_seq_len": 64, "vocab_size": 512, "device_batch_size": 2, "device": "cpu"}
TRAIN = TINY | {"total_batch_size": 128, "num_iterations": 4, "eval_tokens": 512, "sample_every": 0}
SMALL = {
    "train": TRAIN,
    "lr_find": TRAIN | {"steps": 20},
    "compare": TRAIN | {"rates": 1, "seeds": 1, "total_batch_size": 512},
    "batch_size": TRAIN | {"device_batch_size": 1, "steps": 12, "skip": 2},
    "bench": {"seconds": 0.01, "repeats": 1},
    "evaluate": {"max_tokens": 512},
    "generate": {"max_tokens": 8},
    "finetune": {"num_iterations": 2, "eval_tokens": 512, "sample_every": 0, "device": "cpu"},
    "memory": {},
}
MEASURED_MEMORY = {name: TINY[name] for name in ("depth", "head_dim", "max_seq_len", "vocab_size", "device_batch_size")}
# Commands whose time is that of constants of the package, which this program makes small.
PROGRAM, OF_THE_PROGRAM = Path(__file__).with_name("small_program.py"), {"demonstrate", "bench"}
# Commands that serve, build or need a GPU: their flags are parsed elsewhere, and they are not run.
NOT_RUN = {"serve", "bench.gpu", "bench.load"}
# Flags that exclude a number of steps.
HORIZONS = ("target-flops", "target-param-data-ratio")


def in_fences(text, marked=True):
    """Return the command lines in the shell fences of a chapter. marked: also in those that a program fills."""
    lines = [
        line
        for language, content, mark in marks.fences(text)
        if language == "sh" and (marked or not mark)
        for line in content.replace("\\\n", " ").splitlines()
    ]
    return [" ".join(line.split()) for line in lines if line.strip()]


def of(text):
    """Return the command lines in the shell fences of a chapter, and in the evidence of its claims, each once."""
    lines = in_fences(text)
    for claim in marks.claims(text).values():
        spans = re.findall(r"`([^`]+)`", claim.partition("*Shown by*")[2])
        lines += [span for span in spans if not span.startswith("tests/")]
    for row in re.findall(r"^\|.*\|$", text, re.M):
        lines += re.findall(r"`(python -m nanochat_native[^`]*)`", marks.NUMBER.sub("", row))
    return list(dict.fromkeys(" ".join(line.split()) for line in lines))


def split(line):
    """Return (variables, words) of a command line."""
    words = shlex.split(line, comments=True)
    variables = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return variables, words


def with_flags(args, flags):
    """Return arguments in which `flags` replace what was given."""
    found = list(args)
    for name, value in flags.items():
        switch = f"--{name.replace('_', '-')}"
        if switch in found:
            place = found.index(switch)
            del found[place : place + (1 if value is True else 2)]
        found += [switch] if value is True else [switch, str(value)]
    return found


def small_case(word):
    """Return an argument of compare in which a case has few steps and a small vocabulary."""
    word = re.sub(r"(--num-iterations) \d+", r"\1 4", word)
    return re.sub(r"(--vocab-size) (\d+)", lambda match: f"{match[1]} {300 + int(match[2]) // 64}", word)


def small(line):
    """Return (variables, words) of a command at a small size, or None for one that is not run."""
    variables, words = split(line)
    if words[0] == "torchrun":
        place = words.index("--")
        flags = with_flags(words[place + 1 :], TRAIN | {"device_batch_size": 1})  # two ranks share the batch
        ranks = with_flags(words[1 : words.index("-m")], {})
        return variables, ["-m", "torch.distributed.run", *ranks, "-m", "nanochat_native.train", "--", *flags]
    if words[:2] != ["python", "-m"] or not words[2].startswith("nanochat_native"):
        return None
    module, args = words[2].removeprefix("nanochat_native").lstrip("."), words[3:]
    if module in NOT_RUN:
        return None
    flags = dict(SMALL.get(module, {}))
    if module == "train" and "--resume" in args:
        flags = {"num_iterations": 8}
    if module == "train" and "--dry-run" in args:
        flags = {}
    if module == "memory" and {"--measure", "--checkpointing"} & set(args):
        flags = dict(MEASURED_MEMORY)
    if module in ("compare",) and "--fork" in args:
        flags = {"fork_step": 4, "num_iterations": 6}
    if module == "evaluate" and "--compare" in args:  # of runs that the lines before it train
        flags |= {"checkpoint": "runs/d4", "compare": "runs/d4"}
    if any(f"--{horizon}" in args for horizon in HORIZONS):
        flags.pop("num_iterations", None)
    if module == "bench":
        args = ["d4 T 64 B 2 V 8192" if word == "training step" else word for word in args]
    if module == "compare":
        args = [small_case(word) for word in args]
    if module == "guide":
        args = ["1" if word == "NUMBER" else word for word in args]
    return variables, [str(PROGRAM) if module in OF_THE_PROGRAM else "-m", words[2], *with_flags(args, flags)]


def environment(variables):
    return os.environ | {"OMP_NUM_THREADS": "1"} | variables


def interpreter(words):
    """Return the program that runs the words: the fork server, or a real interpreter for torchrun."""
    return sys.executable if "torch.distributed.run" in words else python()


# Commands that leave the runs runs/d4 and runs/d4-chat.
PREPARATION = (
    ["-m", "nanochat_native.train", *with_flags(["--recipe", "october", "--run", "d4", "--diagnose"], TRAIN)],
    ["-m", "nanochat_native.finetune", *with_flags(["--checkpoint", "runs/d4"], SMALL["finetune"])],
)
