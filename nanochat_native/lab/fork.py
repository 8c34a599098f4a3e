"""A fork of a run: its state at a checkpoint, from which the cases of a comparison continue with flags of their own."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

from nanochat_native.runs import checkpoint
from nanochat_native.runs.config import FinetuneConfig, ReinforceConfig, TrainConfig, command_of, shown
from nanochat_native.runs.run_folder import PER_CALL_FLAGS, load_config, other_data, save_config
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import UNSET, flag

# Flags that a fork keeps: the shape of the weights, the kind of optimizer state, and the rows of a step, because the
# data continues at the number of the step.
KEPT = (
    *("recipe", "architecture", "depth", "head_dim", "n_kv_head", "vocab_size"),
    *("value_embeddings", "residual_scalars", "smear", "backout"),
    *("optimizer", "total_batch_size", "max_seq_len"),
)
DATA = ("data", "text_column")  # compared by content with the run, and by value between the cases


@dataclass(frozen=True)
class Fork:
    """The state of a run at a checkpoint.

    Attributes:
        run: the config of the run.
        step: the number of steps that the run had done.
        data_hash: the hash of its data.
        weights: the hash of its weights.
    """

    run: TrainConfig
    step: int
    data_hash: str
    weights: str

    def check(self, config: TrainConfig, plan: TrainConfig) -> None:
        """Raise ConfigError for flags of a case with which it cannot continue from here.

        plan: the flags that all cases share.
        """
        run = self._with_data_of(plan)
        changed = [name for name in (*KEPT, *DATA) if getattr(config, name) != getattr(run, name)]
        if changed:
            listed = ", ".join(f"{flag(name)} {shown(run, name)} -> {shown(config, name)}" for name in changed)
            raise ConfigError(
                f"a fork must keep the model, the optimizer, the data and the batch of its run, got {listed}"
            )
        if config.num_iterations <= self.step:
            raise ConfigError(
                f"--num-iterations must be > {self.step}, the step of the fork, got {config.num_iterations}"
            )

    def check_data(self, config: TrainConfig, data_hash: str) -> None:
        """Raise ConfigError for data that the run did not begin with."""
        if data_hash != self.data_hash:
            raise other_data(self._with_data_of(config))

    def _with_data_of(self, config: TrainConfig) -> TrainConfig:
        """Return the config of the run, with the flags of the data from another config."""
        return dataclasses.replace(self.run, **{name: getattr(config, name) for name in DATA})

    def start(self, config: TrainConfig) -> None:
        """Create the folder of a run that continues from here, with a copy of the checkpoint. It has no log yet."""
        copy = checkpoint.path_of(config.run_dir / "checkpoints", self.step)
        shutil.copytree(checkpoint.path_of(self.run.run_dir / "checkpoints", self.step), copy)
        save_config(config, self.data_hash)  # last, because it marks the folder as a run


def defaults_of(folder: Path) -> TrainConfig:
    """Return the flags that a fork of the run in `folder` starts with: those of the run, but for the folder and the
    evaluations.

    Raises ConfigError if `folder` is not a run of train.
    """
    config = load_config(folder)
    if isinstance(config, FinetuneConfig | ReinforceConfig):
        raise ConfigError(f"--fork must be a run of nanochat_native.train, got {folder}, a run of {command_of(config)}")
    plain = TrainConfig()
    own = {name: getattr(plain, name) for name in (*PER_CALL_FLAGS, "diagnose")}
    if config.momentum_final == config.momentum_end:  # then it follows the --momentum-end of each case
        own["momentum_final"] = plain.momentum_final
    return dataclasses.replace(config, **own, eval_every=UNSET)


def open_fork(folder: Path, step: int | None, console: Console) -> Fork:
    """Return the state of the run in `folder` at the checkpoint of `step`, or at the newest intact one.

    Raises:
        ConfigError: `folder` is not a run, or its checkpoint has no state of the optimizers.
        CheckpointError: the checkpoint is missing or damaged.
    """
    checkpoints = folder / "checkpoints"
    meta = checkpoint.load_meta(checkpoints, step, warn=lambda message: console.say(f"warning: {message}"))
    if meta.get("imported"):
        raise ConfigError(f"{checkpoints} was imported: it has no optimizer state to continue from")
    weights = checkpoint.weights_hash(checkpoints, meta["step"])
    return Fork(load_config(folder), meta["step"], meta["data_hash"], weights)
