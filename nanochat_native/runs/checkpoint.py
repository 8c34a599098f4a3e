"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is a folder, `step_000100`, that appears whole or not at all: its files are written into a hidden temporary
folder, flushed to the disk, and renamed into place. Tensors are safetensors and everything else is JSON.
`manifest.json` holds the size and the SHA-256 of every file. Nothing is ever unpickled.

    step_000100/model.safetensors  optimizer.safetensors  meta.json  manifest.json  measurement.json

measurement.json is not in the manifest: it is written later, after the evaluation of that step, and may be missing.

With several ranks the state of the optimizers is a folder instead, `optimizer/`, with one file for each rank.
torch.distributed.checkpoint writes it, as safetensors, while training continues.
"""

import errno
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from nanochat_native.runtime.errors import UserError
from nanochat_native.runtime.files import fsync, sha256_file, write_atomically

T = TypeVar("T")

FORMAT = "nanochat-native checkpoint"
VERSION = 1
OPTIMIZER = "optimizer"
MEASUREMENT = "measurement.json"
SPACE_MARGIN = 1 << 20  # bytes for headers, JSON and folder entries

_NAME = re.compile(r"step_(\d{6,})")
_TEMPORARY = ".tmp-"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, incomplete or damaged. The message names the file."""


def path_of(folder: Path | str, step: int) -> Path:
    """Return the path of the checkpoint of `step` in `folder`."""
    return Path(folder) / f"step_{step:06d}"


def steps(folder: Path | str) -> list[int]:
    """Return the steps of the checkpoints in `folder`, oldest first, without checking that they are intact."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)


def save(
    folder: Path | str, step: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write the checkpoint of `step`, delete old ones, and return the new folder.

    Args:
        tensors: tensors of any shape, dtype and device by file stem and name: {"model": {...}, "optimizer": {...}}.
        meta: values that JSON can hold.
        keep: number of checkpoints to keep. Checkpoints of later steps are kept, too, and do not count.

    Raises:
        ValueError: for a wrong argument.
        OSError: if the disk is too full or a write fails; it names the folder and the space that is needed. The earlier
            checkpoints are then still there, and nothing else is.
    """
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    meta_bytes = _meta_bytes(step, meta)
    folder = Path(folder)
    tensor_bytes = sum(t.nbytes for group in tensors.values() for t in group.values())
    _require_space(folder, step, tensor_bytes + len(meta_bytes))
    target = path_of(folder, step)
    temporary = folder / f"{_TEMPORARY}{target.name}"
    try:
        temporary.mkdir()
        for stem, group in tensors.items():
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in group.items()}
            save_file(plain, temporary / f"{stem}.safetensors")
        _seal(temporary, target, step, meta_bytes, keep)
    except Exception as error:
        _remove_leftovers(folder)
        if isinstance(error, ValueError):
            raise
        raise _not_written(folder, step, error) from error
    return target


def _meta_bytes(step: int, meta: Mapping[str, Any]) -> bytes:
    return json.dumps({**meta, "step": step}, indent=1).encode()


def _require_space(folder: Path, step: int, content_bytes: int) -> None:
    """Create the folder and remove what killed saves left there. Raise OSError if the disk is too full."""
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    needed, free = content_bytes + SPACE_MARGIN, shutil.disk_usage(folder).free
    if free < needed:
        message = (
            f"the checkpoint of step {step} needs {needed / 1e6:.1f} MB, but the disk has {free / 1e6:.1f} MB free"
        )
        raise OSError(errno.ENOSPC, message, str(folder))


def _not_written(folder: Path, step: int, error: BaseException) -> OSError:
    message = f"the checkpoint of step {step} could not be written ({error}); the earlier ones are unchanged"
    return OSError(getattr(error, "errno", None) or errno.EIO, message, str(folder))


def _seal(temporary: Path, target: Path, step: int, meta_bytes: bytes, keep: int) -> None:
    """Add meta.json and the manifest to the written tensors, move them into place, and delete old checkpoints."""
    (temporary / "meta.json").write_bytes(meta_bytes)
    paths = sorted(path for path in temporary.rglob("*") if path.is_file())
    files = {
        str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in paths
    }
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in temporary.rglob("*"):
        fsync(path)
    fsync(temporary)
    _move_into_place(temporary, target)
    for old in [s for s in steps(target.parent) if s <= step][:-keep]:
        _remove(path_of(target.parent, old))


class ShardedSave:
    """A checkpoint that all ranks write together in the background, with the current values of the tensors.

    All ranks must see the same `folder`. Rank 0 also writes the weights and moves everything into place. If a part
    fails on a rank, `failed` says why; the caller must tell the other ranks. The order of calls:

        prepare() on rank 0
        start() on all ranks
        seal() on rank 0, once all ranks are `done`
        close() on all ranks, once rank 0 is `done`
    """

    def __init__(self, folder: Path | str, step: int, *, rank: int, keep: int = 2) -> None:
        self.folder, self.step, self.rank, self.keep = Path(folder), step, rank, keep
        self.target = path_of(self.folder, step)
        self.temporary = self.folder / f"{_TEMPORARY}{self.target.name}"
        self._jobs: list[Future[Any]] = []
        self._pool = ThreadPoolExecutor(1)

    def prepare(self, tensor_bytes: int) -> None:
        """Create the folder, on rank 0. Raise OSError if the disk has no space for the `tensor_bytes` of all ranks."""
        _require_space(self.folder, self.step, tensor_bytes)
        (self.temporary / OPTIMIZER).mkdir(parents=True)

    def start(
        self,
        weights: Mapping[str, Tensor],
        state: Mapping[str, Tensor | DTensor],
        group: dist.ProcessGroup,
        loader_state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy the tensors and start to write them. The next step may then update them in place.

        Args:
            weights: the weights; only rank 0 writes them.
            state: on the CPU, the whole tensors of this rank, and its rows of DTensors that all ranks have.
            loader_state: the state of the loader, on the CPU, if it has one; only rank 0 writes it.
        """
        if self.rank == 0:
            plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()}
            self._jobs.append(self._pool.submit(save_file, plain, self.temporary / "model.safetensors"))
            if loader_state:
                path = self.temporary / "loader.safetensors"
                self._jobs.append(self._pool.submit(save_file, dict(loader_state), path))
        writer = dcp.HuggingFaceStorageWriter(str(self.temporary / OPTIMIZER), save_distributed=True)
        job = dcp.async_save(dict(state), storage_writer=writer, process_group=group)
        self._jobs.append(cast("Future[Any]", job))

    @property
    def done(self) -> bool:
        """Whether the work that this rank started has ended."""
        return all(job.done() for job in self._jobs)

    @property
    def failed(self) -> str:
        """The error of the work that has ended, or an empty string."""
        errors = [error for job in self._jobs if job.done() and (error := job.exception())]
        return str(_not_written(self.folder, self.step, errors[0])) if errors else ""

    def seal(self, meta: Mapping[str, Any]) -> None:
        """Start to move the checkpoint into place, on rank 0."""
        self._jobs = [
            self._pool.submit(_seal, self.temporary, self.target, self.step, _meta_bytes(self.step, meta), self.keep)
        ]

    def close(self) -> None:
        """End the thread, and delete a checkpoint that was not sealed."""
        self._pool.shutdown()
        if self.rank == 0:
            _remove_leftovers(self.folder)


def add_measurement(folder: Path | str, step: int, validation_bpb: float) -> None:
    """Write the validation bits per byte of a checkpoint beside it, so that `load` adds them to its meta.

    Raises OSError.
    """
    content = {"validation_bpb": validation_bpb, "measured_step": step}
    write_atomically(path_of(folder, step) / MEASUREMENT, json.dumps(content))


def _measurement(path: Path) -> dict[str, Any]:
    """Return what add_measurement wrote into the checkpoint at `path`, or {} if it is missing or damaged."""
    try:
        found = json.loads((path / MEASUREMENT).read_bytes())
        return {"validation_bpb": float(found["validation_bpb"]), "measured_step": int(found["measured_step"])}
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return {}


def load(
    folder: Path | str, step: int | None = None, *, warn: Callable[[str], None] = warnings.warn
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return (tensors by file stem and name, on the CPU; meta, including "step") of a checkpoint.

    Every file is first checked against the manifest.

    Args:
        step: exactly this checkpoint is read. None means the newest intact one.
        warn: receives a message about each newer checkpoint that is damaged.

    Raises:
        CheckpointError: if no checkpoint is intact or there is none of `step`; it names the files or the steps.
    """
    return _read_intact(folder, step, warn, _read)


def load_meta(
    folder: Path | str, step: int | None = None, *, warn: Callable[[str], None] = warnings.warn
) -> dict[str, Any]:
    """Return the meta of the checkpoint that `load` would read, with the same checks and errors, but no tensors."""
    return _read_intact(folder, step, warn, _read_meta)


def _read_intact(
    folder: Path | str, step: int | None, warn: Callable[[str], None], read: Callable[[Path, list[str]], T]
) -> T:
    """Return read(path, names of its files) of the checkpoint that `load` describes."""
    there = steps(folder)
    if step is not None and there and step not in there:
        raise CheckpointError(f"{folder} holds no checkpoint of step {step}, but of {', '.join(map(str, there))}")
    candidates = there if step is None else [step] if there else []
    damage: list[str] = []
    for candidate in reversed(candidates):
        try:
            path = path_of(folder, candidate)
            content = read(path, verify(path))
        except CheckpointError as error:
            damage.append(str(error))
            continue
        for message in damage:
            warn(f"{message}: using the checkpoint of step {candidate} instead")
        return content
    if not damage:
        raise CheckpointError(f"{folder} holds no checkpoint")
    raise CheckpointError("no intact checkpoint: " + "; ".join(damage))


def _read(path: Path, names: list[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    try:
        tensors = {Path(n).stem: load_file(path / n) for n in names if n.endswith(".safetensors") and "/" not in n}
        if (path / OPTIMIZER).is_dir():
            tensors[OPTIMIZER] = _read_shards(path / OPTIMIZER)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    return tensors, _read_meta(path, names)


def _read_meta(path: Path, names: list[str]) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads((path / "meta.json").read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    return meta | _measurement(path)


def _read_shards(path: Path) -> dict[str, Tensor]:
    """Return the whole tensors of a state that several ranks wrote."""
    reader = dcp.HuggingFaceStorageReader(str(path))
    described = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads for itself
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def latest(folder: Path | str) -> int | None:
    """Return the step of the newest intact checkpoint in `folder`, or None if there is none."""
    for step in reversed(steps(folder)):
        try:
            verify(path_of(folder, step))
        except CheckpointError:
            continue
        return step
    return None


def verify(path: Path) -> list[str]:
    """Check the size and the SHA-256 of every file of the checkpoint at `path`, and return their names.

    Raises CheckpointError with the name of the file that is missing or damaged.
    """
    manifest_path = path / "manifest.json"
    try:
        manifest = json.loads(manifest_path.read_bytes())
        described, version, step, files = (manifest[key] for key in ("format", "version", "step", "files"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{manifest_path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{manifest_path} is damaged ({type(error).__name__}: {error})") from None
    if described != FORMAT or path_of(path.parent, step) != path or "meta.json" not in expected:
        raise CheckpointError(f"{manifest_path} is damaged (it describes {described!r} of step {step})")
    if version != VERSION:
        raise CheckpointError(f"{manifest_path} must have version {VERSION}, got {version}")
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} is damaged (it must have {size} bytes, got {file.stat().st_size})")
        if sha256_file(file) != digest:
            raise CheckpointError(f"{file} is damaged (its SHA-256 differs from the manifest)")
    return list(expected)


def weights_hash(folder: Path | str, step: int) -> str:
    """Return the SHA-256 of the weights of the checkpoint of `step`, from its manifest.

    Raises CheckpointError if the manifest is missing or damaged.
    """
    path = path_of(folder, step) / "manifest.json"
    try:
        return str(json.loads(path.read_bytes())["files"]["model.safetensors"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({type(error).__name__}: {error})") from None


def flatten_optimizers(
    named_parameters: Iterable[tuple[str, Tensor]], optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of the optimizers as (tensors by "<parameter>.<key>", scalars by "<parameter>.<key>").

    The names make it independent of parameter groups, their order and the number of ranks. For a sharded optimizer it
    is the part of this rank.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, parameter in named_parameters:
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                (tensors if isinstance(value, Tensor) else scalars)[f"{name}.{key}"] = value
    return tensors, scalars


def restore_optimizers(
    named_parameters: Iterable[tuple[str, Tensor]],
    optimizers: Sequence[torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> None:
    """Load the whole state from `flatten_optimizers` into the optimizers, after the weights are loaded.

    An optimizer with a method `restore`, such as this package's, takes its part through it. Tensors go to the device of
    their parameter, but 0-d tensors stay on the CPU. Raises CheckpointError for a value that belongs to no parameter of
    the optimizers.
    """
    left = {**tensors, **scalars}
    owner = {id(p): opt for opt in optimizers for group in opt.param_groups for p in group["params"]}
    for name, parameter in named_parameters:
        prefix = f"{name}."
        state = {full.removeprefix(prefix): left.pop(full) for full in list(left) if full.startswith(prefix)}
        optimizer = owner[id(parameter)]
        if hasattr(optimizer, "restore"):
            optimizer.restore(parameter, state)
            continue
        for key, value in state.items():
            if isinstance(value, Tensor):
                value = value.to(parameter.device if value.ndim else "cpu", copy=True)
            optimizer.state[parameter][key] = value
    if left:
        raise CheckpointError(f"optimizer state of unknown parameters: {', '.join(sorted(left))}")


def _move_into_place(temporary: Path, target: Path) -> None:
    """Rename the checkpoint and flush the folder. Any earlier checkpoint of the same step is removed."""
    if target.exists():
        target.rename(target.with_name(f"{_TEMPORARY}replaced-{target.name}"))
    temporary.rename(target)
    fsync(target.parent)
    _remove_leftovers(target.parent)


def _remove(path: Path) -> None:
    """Delete a checkpoint; a kill in between leaves nothing that looks like one."""
    doomed = path.with_name(f"{_TEMPORARY}removed-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed saves left behind."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
