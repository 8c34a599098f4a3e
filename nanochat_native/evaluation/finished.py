"""Finished measurements in the folder of --out, in finished.json, which --resume does not make again.

Each has the facts that its result depends on: the bits of the weights, the data of the task, flags, and of every rank
its code, versions, machine and choice of kernels. A result is used only if all of them are the same, so that a resumed
command prints what an uninterrupted one prints.
"""

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from nanochat_native.model.gpt import GPT
from nanochat_native.ops import backends
from nanochat_native.runs import pictures, results
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.files import is_temporary, sha256_file, sha256_json, write_atomically

FILE = "finished.json"
FORMAT = "nanochat-native finished measurements"

R = TypeVar("R", bound=NamedTuple)


def open_folder(out: Path, command: str, *, resume: bool) -> Path:
    """Create and return the folder of a command's result, which with `resume` may be one that the command has used.

    Raises ConfigError for a folder with other things in it.
    """
    names = {path.name for path in out.iterdir() if not is_temporary(path)} if out.is_dir() else set()
    is_own = names <= {FILE, pictures.RESULT} and all(_is_of(command, out / name) for name in names)
    if resume and out.is_dir() and is_own:
        return out
    try:
        return results.open_folder(out, command)
    except ConfigError as error:
        raise ConfigError(f"{error}; --resume continues what is there" if names and is_own else str(error)) from None


def _is_of(command: str, path: Path) -> bool:
    """Return whether a file is of this command, or damaged, so that nobody needs it."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return True
    if not isinstance(content, dict) or (path.name == FILE and "command" not in content):
        return True
    return content.get("command") == command


class Finished:
    """The finished measurements of a command."""

    def __init__(self, out: Path | None, command: str, device: torch.device, world: World) -> None:
        """Read the measurements that are in a folder. A file that is damaged is named, and nothing of it is used.

        out: the folder of --out, on every rank; None without --out.
        """
        folder = out if world.is_rank0 else None
        self._folder, self._command, self._world = folder, command, world
        self._of_this_rank = None if out is None else facts_of_rank(device)
        self._of_ranks: list[dict[str, Any] | None] = []
        self._before: dict[str, dict[str, Any]] = {}
        self._used = set[str]()
        if folder is not None:
            try:
                self._before = _read(folder / FILE)
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                _say(f"note: {folder / FILE} is damaged, everything is measured again ({reason})")
        self._entries = dict(self._before)
        if self._before:
            _say(f"resume   {folder} has {_count(len(self._before))}")

    def result(self, kind: type[R], facts: Callable[[], dict[str, Any]], measure: Callable[[], R]) -> R:
        """Return the result of a measurement, on every rank: the one that is there, or that of measure(), and keep it.

        Args:
            kind: the class of the result.
            facts: returns what the result depends on, beside those of facts_of_rank, as JSON.
        """
        key, known, result = "", {}, None
        if not self._of_ranks:
            self._of_ranks = self._world.all_gather_object(self._of_this_rank)
        if self._folder is not None:
            known = {"ranks": self._of_ranks} | facts() | {"figures": list(kind._fields)}
            key = sha256_json(known)
            entry = self._before.get(key)
            if entry is not None:
                result = kind._make(entry["result"][name] for name in kind._fields)
                self._used.add(key)
        result = self._world.all_gather_object(result)[0]
        if result is None:
            result = measure()
            if self._folder is not None:
                self._entries[key] = {"facts": known, "result": result._asdict()}
                self._write(self._folder)
        return result

    def note_unused(self) -> None:
        """Say how many of the measurements that were in the folder did not fit, if there are any."""
        unused = len(self._before) - len(self._used)
        if unused:
            differ = "flags, data, model, versions or machine differ"
            _say(f"note: {_count(unused)} in {self._folder} did not fit: {differ}")

    def _write(self, folder: Path) -> None:
        content = list(self._entries.values())
        record = {"format": FORMAT, "command": self._command, "sha256": sha256_json(content), "finished": content}
        write_atomically(folder / FILE, json.dumps(record, indent=1) + "\n")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the measurements in a file by the hash of their facts. Raises an error for a file that is damaged."""
    if not path.exists():
        return {}
    record = json.loads(path.read_bytes())
    if record["format"] != FORMAT:
        raise ValueError("another program wrote it")
    if record["sha256"] != sha256_json(record["finished"]):
        raise ValueError("its SHA-256 differs")
    return {sha256_json(entry["facts"]): entry for entry in record["finished"]}


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _count(number: int) -> str:
    return f"{number} finished measurement{'s' * (number > 1)}"


def hash_of(model: GPT) -> str:
    """Return the SHA-256 of a model's config and of the bits of its weights, in hex."""
    digest = hashlib.sha256(repr(dataclasses.asdict(model.config)).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def facts_of_rank(device: torch.device) -> dict[str, Any]:
    """Return what every result of this rank depends on: its code, versions, machine and choice of kernels, as JSON."""
    return {
        "code": hash_of_code(),
        "versions": results.versions(str(device)),
        "settings": backends.settings(device),
    }


@functools.cache
def hash_of_code() -> str:
    """Return the SHA-256 of the Python files and of the native module of this package, in hex."""
    package, native = Path(__file__).parents[1], backends.native_file()
    files = {str(path.relative_to(package)): sha256_file(path) for path in package.rglob("*.py") if path.is_file()}
    return sha256_json([files, None if native is None else sha256_file(native)])
