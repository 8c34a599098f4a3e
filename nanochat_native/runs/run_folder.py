"""The folder of a run: its config.json, and how a later command finds, resumes or overwrites the run.

OUT_DIR/RUN/  config.json  data_files.json  metrics.jsonl  loggers.json  tensorboard/  wandb/  loss.png  diagnosis.png
              tokenizer/  checkpoints/step_000100/
"""

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanochat_native.runs import checkpoint
from nanochat_native.runs.config import (
    CHAT_FLAGS,
    LEARNING_RATE_FLAGS,
    LOGGER_FLAGS,
    C,
    FinetuneConfig,
    ReinforceConfig,
    TrainConfig,
    command_of,
    parse,
    resolve_device,
    resolve_recipe,
    shown,
    to_json,
    upgraded,
)
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.files import is_temporary, lock_folder, write_atomically
from nanochat_native.runtime.flags import UNSET, flag

FORMAT = "nanochat-native run"
DATA_FILES = "data_files.json"
ENTRIES = (
    "config.json",
    DATA_FILES,
    "metrics.jsonl",
    "loggers.json",
    "tensorboard",
    "wandb",
    "loss.png",
    "diagnosis.png",
    "tokenizer",
    "checkpoints",
)
DAMAGED_LOGS = "metrics.damaged*.jsonl"  # written by metrics_log.drop_records_after
# Flags that may change on resume. Any other change, except a longer training, would make it another run.
PER_CALL_FLAGS = ("run", "out_dir", "resume", "overwrite", "dry_run", "print_config", "json")
FLAGS_OF_SCORES = {"core": ("core_every", "core_max_per_task"), "chat_tasks": CHAT_FLAGS[1:]}
REPORT_FLAGS = ("core", *FLAGS_OF_SCORES["core"], *LOGGER_FLAGS)  # of train and finetune, not of experiments
MAY_CHANGE_ON_RESUME = (
    *PER_CALL_FLAGS,
    "cache_dir",
    "eval_every",
    "eval_tokens",
    "eval_examples",
    "eval_samples",
    *REPORT_FLAGS,
    *CHAT_FLAGS,
    "sample_every",
    "save_every",
    "keep",
    "diagnose",
    "diagnose_every",
    "max_skipped_steps",
    "check_replicas_every",
    "cuda_graphs",
)
# Flags of the data, which is compared by the hash in config.json, not by its path.
COMPARED_BY_CONTENT = ("data", "text_column", "val_data", "mix", "task", "task_data")
CHANGES_ROUNDING = ("device", "device_batch_size", "backend", "grad_checkpoint")
CONFIG_OF_COMMAND: dict[str, type[TrainConfig]] = {
    "train": TrainConfig,
    "finetune": FinetuneConfig,
    "reinforce": ReinforceConfig,
}


def resolve_config(
    args: Sequence[str],
    kind: type[C] = TrainConfig,  # type: ignore[assignment]
    resolve: Callable[[C], C] = resolve_device,
) -> tuple[C, list[str]]:
    """Return the config of a command line, and the flags that change the rounding of a resumed run, a note each.

    With --resume the other flags default to those of the run, and --resume becomes None if "auto" finds no run. The
    horizon is left to resolve_horizon, and the batch to training/sizing.py.

    Args:
        kind: the class of the config.
        resolve: gives values to the flags that are unset.

    Raises:
        ConfigError: for a wrong flag or a run that cannot be resumed with these flags.
    """
    config = parse(args, kind=kind)
    if config.resume in (None, "auto"):
        config = resolve(config)
        if config.resume is None:
            return config, []
        if not (config.run_dir / "config.json").exists():
            return dataclasses.replace(config, resume=None), []
    folder = config.run_dir if config.resume == "auto" else _run_folder_of(Path(str(config.resume)))
    saved = load_config(folder)
    if not isinstance(saved, kind) or type(saved) is not kind:
        raise ConfigError(f"{folder} was created by nanochat_native.{command_of(saved)}: resume it with that")
    wanted = resolve(parse(args, base=without_removed(saved, args)))
    wanted = dataclasses.replace(wanted, out_dir=saved.out_dir, run=saved.run)
    return wanted, changes(saved, wanted)


def without_removed(config: C, args: Sequence[str]) -> C:
    """Return the config without the flags that a command line removes: those of a score that it turns off."""
    last: dict[str, str] = {}  # the first value of each flag where it stands last
    for word, following in itertools.zip_longest(args, args[1:], fillvalue="--"):
        name, has_value, value = word.partition("=")
        last[name.replace("_", "-")] = value if has_value else following
    removed: list[str] = []
    for main, names in FLAGS_OF_SCORES.items():
        value = last.get(flag(main), "")
        if value == "None" or value.startswith("--"):
            removed += [main, *names]
    fields = config.__dataclass_fields__
    defaults: dict[str, Any] = {name: fields[name].default for name in removed if name in fields}
    return dataclasses.replace(config, **defaults)


def _run_folder_of(path: Path) -> Path:
    """Return the folder of a run, given this folder, its `checkpoints`, or the newest checkpoint in there."""
    if is_run(path.parent.parent) and path.name != max(os.listdir(path.parent)):
        raise ConfigError(f"--resume must be the newest checkpoint of a run, or its folder, got {path}")
    places = (path, path.parent, path.parent.parent)
    named = (path, *(folder.parent for folder in places[:2] if folder.name == "checkpoints"))
    return next((folder for folder in places if is_run(folder)), named[-1])


def is_run(folder: Path) -> bool:
    """Return whether `folder` has the config.json of a run."""
    try:
        _read_config(folder)
    except ConfigError:
        return False
    return True


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the content of the config.json of a run. Raise ConfigError if it is missing or damaged."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ConfigError(f"{folder} is not a run of this program: its {path.name} is from another one")
        if not isinstance(content["config"], dict):
            raise TypeError("config is not an object")
    except FileNotFoundError:
        raise ConfigError(f"{folder} is not a run of this program: it has no {path.name}") from None
    except NotADirectoryError:
        raise ConfigError(f"{folder} is not a folder") from None
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    return content


def load_config(folder: Path) -> TrainConfig:
    """Return the config of the run in `folder`. Raise ConfigError if there is none, or if another version wrote it."""
    content = _read_config(folder)
    flags = content["config"]
    # Runs of earlier versions do not name their command; only finetune had the flag --rate-scale.
    command = content.get("command", "finetune" if "rate_scale" in flags else "train")
    if flags.get("optimizer") == "sgd" and "ns_steps" not in flags:  # sgd had one learning rate in earlier versions
        flags |= dict.fromkeys(LEARNING_RATE_FLAGS, 0.1 if flags["matrix_lr"] == UNSET else flags["matrix_lr"])
    flags = upgraded(flags)
    place = folder if folder.name not in ("", "..") else folder.resolve()
    flags |= {"out_dir": place.parent, "run": place.name, "cache_dir": Path(flags["cache_dir"])}
    try:
        for name in ("core", "chat_data", "task_data"):
            if flags.get(name) is not None:
                flags[name] = Path(flags[name])
        if command in ("finetune", "reinforce"):
            flags["checkpoint"] = Path(flags["checkpoint"])
        config = CONFIG_OF_COMMAND[command](**flags)
        return resolve_recipe(config, default=config.recipe)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'config.json'} was written by another version ({error})") from None


def require_same_data(config: TrainConfig, data_hash: str) -> None:
    """Raise ConfigError if the run in the folder began with other data: another hash or, if none was kept, another
    path."""
    kept = _read_config(config.run_dir)
    if "data_hash" in kept:
        same = kept["data_hash"] == data_hash
    else:
        values = ((kept["config"].get(name), getattr(config, name, None)) for name in COMPARED_BY_CONTENT)
        same = all(list(old or ()) == list(new or ()) for old, new in values)
    if not same:
        raise other_data(config)


def save_data_files(config: TrainConfig, files: Sequence[str]) -> None:
    """Write the paths of the files that a run reads, below the folder of --data, for data_files."""
    write_atomically(config.run_dir / DATA_FILES, json.dumps(list(files), indent=1) + "\n")


def data_files(config: TrainConfig) -> list[str] | None:
    """Return the paths of the files with which a run to resume began, below the folder of --data.

    None for a new run and for one that kept no list. Raises ConfigError for a file that cannot be read or is damaged.
    """
    if config.resume is None:
        return None
    path = config.run_dir / DATA_FILES
    try:
        files = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise ConfigError(f"{path} is damaged: it must be a list of paths")
    return files


def other_data(config: TrainConfig) -> ConfigError:
    """Return the error for a run that began with other data."""
    names = ("task", "task_data") if isinstance(config, ReinforceConfig) else COMPARED_BY_CONTENT
    values = {name: getattr(config, name, None) or () for name in names}
    texts = {name: str(value) if isinstance(value, str | Path) else " ".join(value) for name, value in values.items()}
    given = ", ".join(f"{flag(name)} {text}" for name, text in texts.items() if text)
    return ConfigError(
        f"{config.run_dir}: the data or the tokenizer is not what this run began with ({given or 'no --data'}); "
        "start another run with another --run NAME"
    )


def save_config(config: TrainConfig, data_hash: str | None = None) -> None:
    """Write config.json, which marks the folder as a run. data_hash: the hash of its corpus, if known."""
    flags: dict[str, Any] = {name: value for name, value in to_json(config).items() if name not in PER_CALL_FLAGS}
    content = {"format": FORMAT, "command": command_of(config), "config": flags} | (
        {} if data_hash is None else {"data_hash": data_hash}
    )
    write_atomically(config.run_dir / "config.json", json.dumps(content, indent=1) + "\n")


def changes(saved: TrainConfig, wanted: TrainConfig) -> list[str]:
    """Return the flags that change the rounding of a resumed run, one note for each.

    Raises ConfigError, with the names of the flags, for changes that would make it another run.
    """
    allowed = {*MAY_CHANGE_ON_RESUME, *COMPARED_BY_CONTENT, *CHANGES_ROUNDING, "num_iterations"}
    if checkpoint.steps(saved.run_dir / "checkpoints"):
        allowed.add("checkpoint")  # of fine-tuning; it is compared by its weights
    differing = [f.name for f in dataclasses.fields(saved) if getattr(saved, f.name) != getattr(wanted, f.name)]
    refused = [name for name in differing if name not in allowed]
    if wanted.num_iterations < saved.num_iterations:
        refused.append("num_iterations")
    if refused:
        listed = ", ".join(f"{flag(name)} {shown(saved, name)} -> {shown(wanted, name)}" for name in refused)
        raise ConfigError(f"a resumed run must keep its flags, got {listed}; start another run with another --run NAME")
    return [
        f"{flag(name)} {shown(saved, name)} -> {shown(wanted, name)}" for name in differing if name in CHANGES_ROUNDING
    ]


def check_free(config: TrainConfig) -> None:
    """Raise ConfigError if the folder of a new run has content that the run may not overwrite."""
    folder = config.run_dir
    if not folder.exists() or config.resume is not None:
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give another --run NAME or --out-dir PATH")
    if all(map(is_temporary, folder.iterdir())):
        return
    try:
        _read_config(folder)
    except ConfigError as error:
        raise ConfigError(f"{error}; give another --run NAME or --out-dir PATH") from None
    if not config.overwrite:
        raise ConfigError(
            f"{folder} holds a run: --resume auto resumes it, --run NAME starts another, --overwrite deletes it"
        )


def claim(config: TrainConfig) -> int:
    """Create the folder of a run and lock it against other processes. With --overwrite, delete the old run in it.

    Only files that a run writes are deleted. Return the descriptor that holds the lock; closing it, or the end of the
    process, releases it. Raise ConfigError if the folder cannot be used.
    """
    check_free(config)
    folder = config.run_dir
    try:
        descriptor = lock_folder(folder)
    except BlockingIOError:
        raise ConfigError(f"another process is training in {folder}") from None
    except OSError as error:
        raise ConfigError(f"the folder of the run cannot be created ({error}); give another --out-dir PATH") from None
    if config.overwrite and is_run(folder):
        # config.json marks the folder as a run. It is deleted last, so that an interrupted deletion can be repeated.
        left_behind = (path for path in folder.iterdir() if is_temporary(path))
        for path in (*left_behind, *folder.glob(DAMAGED_LOGS), *(folder / name for name in reversed(ENTRIES))):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return descriptor
