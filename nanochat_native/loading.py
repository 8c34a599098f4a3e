"""Reads the model and tokenizer of a run back from its folder, for the command lines that use one."""

import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from torch import Tensor

from nanochat_native import checkpoint, ops
from nanochat_native.config import ConfigError, check_values, one_line_errors
from nanochat_native.isolation import describe, take_any_text
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

    Raises FileNotFoundError when there is no such folder, checkpoint.CheckpointError when no checkpoint is intact or
    there is none of that step, and ValueError when its weights, its model_config and the tokenizer do not belong
    together, or there is no tokenizer.
    """
    run_folder = Path(run_folder)
    if run_folder.is_file():
        raise FileNotFoundError(f"{run_folder} is a file; a model is the folder of a run")
    if not run_folder.is_dir():
        raise FileNotFoundError(f"{run_folder}: no such run folder")
    tensors, meta = checkpoint.load(run_folder / "checkpoints", step, warn=warn)
    missing = [name for name in ("tokenizer_hash", "model_config", "step") if name not in meta]
    if missing or "model" not in tensors:
        raise ValueError(f"{run_folder}: its checkpoint has no {', '.join(missing) or 'weights of a model'}")
    if meta["tokenizer_hash"] is None:
        raise ValueError(f"{run_folder} was trained on tokens without a tokenizer: it has no text")
    tokenizer = Tokenizer.load(run_folder / "tokenizer")
    if meta["tokenizer_hash"] != tokenizer.hash:
        raise ValueError(f"{run_folder / 'tokenizer'} is not the tokenizer that the model was trained with")
    try:
        config = GPTConfig(**meta["model_config"])
    except (TypeError, ValueError) as error:
        reason = re.sub(r"^\S*__init__\(\) ", "", str(error))
        raise ValueError(f"{run_folder}: its model_config is not one of this version ({reason})") from None
    with torch.device("meta"):
        model = GPT(config)
    check_weights(run_folder, tensors["model"], model)
    model.to_empty(device=device)
    model.init_rotary()
    model.load_state_dict(tensors["model"])
    return model, tokenizer, meta


def check_weights(source: Path, tensors: Mapping[str, Tensor], model: GPT) -> None:
    """Raises ValueError, naming up to three, for tensors that are missing, unknown, or of another shape than the
    model's. source: for the message."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors if name not in expected]
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            wrong.append(f"{name} has shape {tuple(tensors[name].shape)}; it takes {shape}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{source}: the weights do not fit model_config: {', '.join(wrong[:3])}{more}")


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


def autocast(device: torch.device) -> torch.autocast:
    """The precision that models run in: bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


T = TypeVar("T")
MISTAKES = (ValueError, ImportError, OSError, checkpoint.CheckpointError)


def parse_options(kind: type[T], command: str, args: Sequence[str] | None = None, **settings: Any) -> T:
    """The flags of a command, sys.argv's by default, as the dataclass `kind` has them. settings: tyro.cli's.

    Raises ConfigError, one line, for an unknown flag or a value that the flag does not take. --help prints and exits.
    """
    given = sys.argv[1:] if args is None else list(args)
    with one_line_errors():
        options: T = tyro.cli(kind, prog=f"python -m nanochat_native.{command}", args=given, **settings)
    check_values(options, given)
    return options


def run_command(
    kind: type[T], command: str, args: Sequence[str] | None, work: Callable[[T], int | None], **settings: Any
) -> int:
    """A command line: parse_options, then the work. Returns the exit code, as exit_code does."""
    try:
        options = parse_options(kind, command, args, **settings)
    except ConfigError as error:
        return mistake(error)
    return exit_code(lambda: work(options))


def mistake(error: Exception) -> int:
    """Says on stderr, in one line, what the user can mend. Returns the exit code for it, 2."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    message = re.sub(r"\s*\n\s*", " ", message.strip())
    print(f"error: {message}", file=sys.stderr)
    return 2


def is_out_of_memory(error: Exception) -> bool:
    """On a CPU torch raises a RuntimeError of no type of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def exit_code(command: Callable[[], int | None]) -> int:
    """Runs a command line's work: what it returns, or 0; 2 after one line on stderr for a mistake of the user's; 1
    where memory is out; 130 after Ctrl-C; 141 where the output is read no more."""
    for stream in (sys.stdout, sys.stderr):
        take_any_text(stream)
    try:
        ops.check_environment()
        ops.use_backend(ops.backend())
    except (ValueError, RuntimeError) as error:
        return mistake(error)
    try:
        return command() or 0
    except BrokenPipeError:  # what reads the output has ended, as head does: there is nobody to tell
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # or Python would complain when it flushes at its end
        return 128 + signal.SIGPIPE
    except MISTAKES as error:
        return mistake(error)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory; try a smaller --device-batch-size ({describe(error)})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
