"""Saves the checkpoints of a run, and loads the newest one to resume it."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from nanochat_native.model.gpt import GPT
from nanochat_native.optim import buckets_of
from nanochat_native.runs import checkpoint
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.distributed import RankError, World
from nanochat_native.runtime.errors import ConfigError


class Checkpointer:
    """The checkpoints of a run in one folder. All ranks call each method, in the same order.

    A single process writes a checkpoint at once. Several ranks only begin it in save(), and write it in the background:
    poll() after each step takes it to its next part, and wait() to its end.

    Attributes:
        saved_step: the step of the newest checkpoint that is complete; -1 if there is none.
    """

    def __init__(
        self,
        folder: Path,
        model: GPT,
        optimizers: Sequence[torch.optim.Optimizer],
        world: World,
        console: Console,
        *,
        keep: int,
    ) -> None:
        self.saved_step = -1
        self._folder, self._world, self._console, self._keep = folder, world, console, keep
        self._model, self._named = model, list(model.named_parameters())
        self._optimizers = optimizers
        self._saving: checkpoint.ShardedSave | None = None
        self._meta: dict[str, Any] | None = None  # meta of the checkpoint in the background, until it is sealed
        self._measured: dict[int, float] = {}  # bits per byte by step, until their checkpoint is complete

    def save(self, step: int, meta: dict[str, Any], loader_state: dict[str, Tensor] | None = None) -> None:
        """Write the checkpoint of `step`. If a value is not finite or the disk is full, say so and keep the others.

        loader_state: of data/loader.py; equal on all ranks, and may be empty.
        """
        loader_state = loader_state or {}
        self.wait()
        weights = {name: parameter.detach() for name, parameter in self._named}
        state, scalars = checkpoint.flatten_optimizers(self._named, self._optimizers)
        own = [name for name, tensor in {**weights, **state}.items() if not tensor.isfinite().all()]
        bad = [name for names in self._world.all_gather_object(own) for name in names]
        if bad:
            self._console.say(f"step {step}: no checkpoint, {bad[0]} is not finite; the earlier ones are kept")
            return
        meta = {**meta, "optimizer": scalars}
        if self._world.size > 1:
            self._begin(step, weights, state, meta, loader_state)
            return
        tensors = {"model": weights, "optimizer": state} | ({"loader": loader_state} if loader_state else {})
        try:
            checkpoint.save(self._folder, step, tensors, meta, keep=self._keep)
        except OSError as error:
            self._console.say(f"warning: {error}")
            return
        self._complete(step)

    def _begin(
        self,
        step: int,
        weights: dict[str, Tensor],
        state: dict[str, Tensor],
        meta: dict[str, Any],
        loader_state: dict[str, Tensor],
    ) -> None:
        world = self._world
        assert world.background is not None
        saving = checkpoint.ShardedSave(self._folder, step, rank=world.rank, keep=self._keep)
        needed = sum(world.all_gather_object(sum(tensor.nbytes for tensor in state.values())))
        needed += sum(tensor.nbytes for tensor in (*weights.values(), *loader_state.values()))
        try:
            world.run_collectively((lambda: saving.prepare(needed)) if world.is_rank0 else lambda: None, OSError)
        except RankError as error:
            self._console.say(f"warning: {error}")
            return
        saving.start(weights, self._as_shards(state), world.background, loader_state)
        self._saving, self._meta = saving, meta

    def _as_shards(self, state: dict[str, Tensor]) -> dict[str, Tensor | DTensor]:
        """Return this rank's state on the CPU. State that is split by rows becomes a DTensor of all ranks' rows."""
        cut = {id(bucket.parameters[0]) for bucket in buckets_of(self._optimizers) if not bucket.whole}
        names = {name for name, parameter in self._named if id(parameter) in cut}
        own = {key: t for key, t in state.items() if t.ndim and key.rsplit(".", 1)[0] in names}
        everyone = self._world.all_gather_object({key: (tuple(t.shape), t.dtype) for key, t in own.items()})
        mesh = init_device_mesh("cpu", (self._world.size,))
        found: dict[str, Tensor | DTensor] = {key: t.cpu() for key, t in state.items() if key not in own}
        for key in dict.fromkeys(key for keys in everyone for key in keys):
            (_, *rest), dtype = next(shapes[key] for shapes in everyone if key in shapes)
            whole = torch.Size((sum(shapes[key][0][0] for shapes in everyone if key in shapes), *rest))
            local = own[key].cpu() if key in own else torch.empty((0, *rest), dtype=dtype)
            stride = torch.empty(whole, device="meta").stride()
            found[key] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole, stride=stride)
        return found

    def poll(self) -> None:
        """Take the checkpoint in the background to its next part, if all ranks have finished this one."""
        if self._saving is None or self._world.all_reduce_max(not self._saving.done):
            return
        failed = next((message for message in self._world.all_gather_object(self._saving.failed) if message), "")
        if not failed and self._meta is not None:
            if self._world.is_rank0:
                self._saving.seal(self._meta)
            self._meta = None
            return
        saving, self._saving = self._saving, None
        saving.close()
        if failed:
            self._console.say(f"warning: {failed}")
        else:
            self._complete(saving.step)

    def wait(self) -> None:
        """Wait until the checkpoint in the background is complete or has failed."""
        while self._saving is not None:
            self.poll()
            time.sleep(0.01)

    def add_measurement(self, step: int, bpb: float) -> None:
        """Store the bits per byte of `step` with its checkpoint, as soon as that is complete."""
        self._measured[step] = bpb
        self._note_measurement()

    def _complete(self, step: int) -> None:
        self.saved_step = step
        self._note_measurement()

    def _note_measurement(self) -> None:
        bpb = self._measured.pop(self.saved_step, None)
        if bpb is not None and self._world.is_rank0:
            with self._console.isolated("note of the validation"):
                checkpoint.add_measurement(self._folder, self.saved_step, bpb)

    def load(self, check: Callable[[dict[str, Any]], None]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Load the newest intact checkpoint into the model and the optimizers. Return its meta and its loader_state.

        check: called with the meta before anything changes; raises for a checkpoint that this run cannot resume from.

        Raises CheckpointError if no checkpoint is intact, and ConfigError for an imported one.
        """
        tensors, meta = checkpoint.load(self._folder, warn=lambda message: self._console.say(f"warning: {message}"))
        if meta.get("imported"):
            raise ConfigError(f"{self._folder} was imported: it has no optimizer state to resume from")
        check(meta)
        self._model.load_state_dict(tensors["model"])
        checkpoint.restore_optimizers(self._named, self._optimizers, tensors["optimizer"], meta["optimizer"])
        self.saved_step = meta["step"]
        return meta, tensors.get("loader", {})
