"""Reads the model and tokenizer of a run back from its folder, for the command lines that use one."""

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat_native import checkpoint, ops
from nanochat_native.model import GPT, GPTConfig
from nanochat_native.tokenizer import Tokenizer


def load_model(
    run_folder: Path | str,
    step: int | None = None,
    device: torch.device | str = "cpu",
    *,
    warn: Callable[[str], None] = print,
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """(model, tokenizer, the checkpoint's meta) of RUN/checkpoints/step_* and RUN/tokenizer, on `device`.

    step: which checkpoint; None for the newest that is intact, and `warn` is told of newer ones that are damaged.

    Raises FileNotFoundError when there is no such folder, checkpoint.CheckpointError when no checkpoint is intact,
    and ValueError when its weights, its model_config and the tokenizer do not belong together, or there is no
    tokenizer.
    """
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        raise FileNotFoundError(f"{run_folder}: no such run folder")
    tensors, meta = checkpoint.load(run_folder / "checkpoints", step, warn=warn)
    if meta["tokenizer_hash"] is None:
        raise ValueError(f"{run_folder} was trained on tokens without a tokenizer: it has no text")
    tokenizer = Tokenizer.load(run_folder / "tokenizer")
    if meta["tokenizer_hash"] != tokenizer.hash:
        raise ValueError(f"{run_folder / 'tokenizer'} is not the tokenizer that the model was trained with")
    config = GPTConfig(**meta["model_config"])
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.init_rotary()
    try:
        model.load_state_dict(tensors["model"])
    except RuntimeError as error:
        mismatch = " ".join(str(error).split())
        raise ValueError(f"{run_folder}: the weights do not fit model_config: {mismatch}") from None
    return model, tokenizer, meta


def pick_device(name: str | None) -> torch.device:
    """The device of that name; None: the GPU where torch sees one, else the CPU. ValueError for a missing GPU."""
    gpu = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if gpu else "cpu")
    if torch.device(name).type == "cuda" and not gpu:
        raise ValueError(f"--device is {name}, but torch sees no GPU; take cpu")
    return torch.device(name)


def check_text(text: str, name: str) -> None:
    """Raises ValueError, with the name of what it is, for text that UTF-8 cannot hold: from bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} has a lone surrogate, or bytes that are not UTF-8; it takes text") from None


def print_any_text() -> None:
    """From now on a character that the terminal's encoding lacks is printed as '?' instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def autocast(device: torch.device) -> torch.autocast:
    """The precision that models run in: bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def exit_code(command: Callable[[], int | None]) -> int:
    """Runs a command line's work: what it returns, or 0; 2 after one line on stderr for a mistake of the user's; 1
    where memory is out; 130 after Ctrl-C; 141 where the output is read no more."""
    try:
        ops.use_backend(ops.backend())
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return command() or 0
    except BrokenPipeError:  # what reads the output has ended, as head does: there is nobody to tell
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # or Python would complain when it flushes at its end
        return 128 + signal.SIGPIPE
    except (ValueError, ImportError, OSError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split())
        print(f"error: out of memory; try a smaller --device-batch-size ({reason})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
