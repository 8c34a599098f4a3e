"""Finished measurements in the folder of --out, in finished.json, which --resume does not make again.

Each has the facts that its result depends on: the bits of the weights, the data of the task, flags, and of every rank
its code, versions, machine and choice of kernels. A result is used only if all of them are the same, so that a resumed
command prints what an uninterrupted one prints.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from nanochat_native.model.gpt import GPT
from nanochat_native.ops import backends
from nanochat_native.runs import pictures, results
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.files import (
    listed,
    lock_folder,
    sha256_file,
    sha256_json,
    temporaries_of,
    visible,
    write_atomically,
)
from nanochat_native.runtime.flags import flag

FILE = "finished.json"
FORMAT = "nanochat-native finished measurements"
OWN = (FILE, pictures.RESULT)
MARK = b"nanochat-native"  # in `format`, with which our files begin, so that a file which was cut has it too
MAY_CHANGE_ON_RESUME = {"out", "resume", "json"}  # flags that change no figure

R = TypeVar("R", bound=NamedTuple)


@contextlib.contextmanager
def open_folder(out: Path, command: str, options: Any) -> Iterator[Path]:
    """Create the folder of a command's result, and keep it locked within the block. The value is the folder.

    With --resume it may be one that the command has used. What killed writes have left there is then deleted.

    Args:
        options: those of the command, with `resume`.

    Raises:
        ConfigError: The folder has other things in it or a result of other flags, or another process uses it.
        OSError: Something in it cannot be read.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out must be a new or an empty folder, got {out}")
    try:
        lock = lock_folder(out)
    except BlockingIOError:
        raise ConfigError(f"another process writes to {out}; give another --out") from None
    try:
        _check(out, command, options)
        if options.resume:
            for path in (left for name in OWN for left in temporaries_of(out / name)):
                path.unlink()
        yield out
    finally:
        os.close(lock)


def _check(out: Path, command: str, options: Any) -> None:
    """Raise ConfigError for a folder that a command may not use with these options."""
    foreign = [name for name in visible(out) if name not in OWN or not _is_of(command, out / name)]
    names = foreign or sorted(path.name for path in out.iterdir())
    if foreign or (names and not options.resume):
        allowed = f"a new or an empty folder{f', or one of {command}' if options.resume else ''}"
        hint = "" if foreign else "; --resume continues what is there"
        raise ConfigError(f"--out must be {allowed}, got {out} with {listed(names)}{hint}")
    if pictures.RESULT in names and (differing := _differing(out, options)):
        raise ConfigError(
            f"a resumed {command} must keep its flags, got {', '.join(differing)}; start another one with another --out"
        )


def _is_of(command: str, path: Path) -> bool:
    """Return whether a file is of this command, or a damaged one of this program, which nobody needs."""
    content = path.read_bytes()
    return not content or (MARK in content and _object(content).get("command", command) == command)


def _object(content: bytes) -> dict[str, Any]:
    """Return the JSON object that a file holds, or an empty one if it is damaged."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _differing(out: Path, options: Any) -> list[str]:
    """Return the flags that the result in a folder has with other values than `options`, with both values.

    A path in another place is the same one if the folder was moved or copied with it, as that of a speedrun can be.
    """
    old = _object((out / pictures.RESULT).read_bytes()).get("options")
    new = json.loads(json.dumps(results.flags_of(options)))
    if not isinstance(old, dict):  # it is damaged
        return []
    places = [os.path.abspath(str(flags.get("out"))) for flags in (old, new)]

    def is_same(*values: Any) -> bool:
        if all(isinstance(value, str) and os.path.isabs(value) for value in values):
            return len({os.path.relpath(value, place) for value, place in zip(values, places, strict=True)}) == 1
        return False

    return [
        f"{flag(name)} {old[name]} -> {new[name]}"
        for name in new
        if name in old and name not in MAY_CHANGE_ON_RESUME
        if old[name] != new[name] and not is_same(old[name], new[name])
    ]


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
            except (ValueError, KeyError, TypeError, RecursionError) as error:
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

    def drop_unused(self) -> None:
        """Remove the measurements that were in the folder and did not fit, if there are any, and say how many."""
        unused = self._before.keys() - self._used
        if unused and self._folder is not None:
            self._entries = {key: entry for key, entry in self._entries.items() if key not in unused}
            self._write(self._folder)
            differ, was = (
                "flags, data, model, code, versions, machine or ranks differ",
                "were" if len(unused) > 1 else "was",
            )
            _say(f"note: {_count(len(unused))} in {self._folder} did not fit, and {was} removed: {differ}")

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
