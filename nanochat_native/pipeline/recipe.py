"""Recipes: the stages of a speedrun as a TOML file, and their command lines.

    about = "..."                  # what the recipe makes, in a sentence
    device = "cpu"                 # cpu or cuda: the --device of every stage
    gpu = "H100"                   # optional: the GPU for which --dry-run estimates time, where there is none

    [samples]                      # optional
    prompts = ["Who are you?"]     # the model answers them after each stage that trains
    max_tokens = 64                # of an answer

    [[stages]]
    name = "base"                  # also of the stage's folder: OUT/base
    command = "train"              # one of COMMANDS
    flags = "--depth 4"            # as on a command line
    about = "..."                  # optional, for the report
    seconds = 190                  # optional: a measured time, for --dry-run

In flags, {base} is the folder of the stage `base`, an earlier one or the stage itself, and {downloads} is the folder of
--downloads.
"""

import dataclasses
import re
import shlex
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_native.data import downloads
from nanochat_native.evaluation import chat_evaluation, session
from nanochat_native.runs.config import FinetuneConfig, ReinforceConfig, TrainConfig, parse
from nanochat_native.runtime.command import check_text, parse_options
from nanochat_native.runtime.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
BY_GPUS = {0: "cpu", 1: "one-gpu", 8: "eight-gpus"}  # the recipe for a value of --gpus
RUNS: dict[str, type[TrainConfig]] = {"train": TrainConfig, "finetune": FinetuneConfig, "reinforce": ReinforceConfig}
MEASURES: dict[str, type[session.Options] | type[chat_evaluation.Options]] = {
    "evaluate": session.Options,
    "chat_eval": chat_evaluation.Options,
}
COMMANDS = (*RUNS, *MEASURES, "download")
DOWNLOADS = "downloads"  # the placeholder
RESERVED = (DOWNLOADS, "logs")
# The flags that a speedrun gives itself, and those that a stage cannot have.
OWN_FLAGS = ("--device", "--out", "--out-dir", "--run", "--resume", "--overwrite")
REFUSED_FLAGS = ("--dry-run", "--print-config", "--json", "--help", "-h")
KEYS = {"about": str, "device": str, "gpu": str, "samples": dict, "stages": list}
SAMPLE_KEYS = {"prompts": list, "max_tokens": int}
STAGE_KEYS = {"name": str, "command": str, "flags": str, "about": str, "seconds": (int, float)}
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Stage:
    """A stage: a command of this package and its flags.

    Attributes:
        flags: the words of the recipe, with placeholders.
        seconds: the time that the recipe gives, or None.
    """

    name: str
    command: str
    flags: tuple[str, ...] = ()
    about: str = ""
    seconds: float | None = None

    @property
    def writes_chats(self) -> bool:
        """Whether the stage is reinforce --write-chats, which trains nothing."""
        return self.command == "reinforce" and any(_name_of(word) == "--write-chats" for word in self.flags)

    @property
    def is_run(self) -> bool:
        """Whether the stage trains: its folder is that of a run."""
        return self.command in RUNS and not self.writes_chats

    @property
    def needs(self) -> tuple[str, ...]:
        """The stages whose folders the flags name."""
        names = [name for word in self.flags for name in _PLACEHOLDER.findall(word)]
        return tuple(name for name in dict.fromkeys(names) if name not in (DOWNLOADS, self.name))

    def recorded(self) -> list[str]:
        """Return the command and its flags. If these words change, the stage must be done again with --redo."""
        return [self.command, *self.flags]


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        name: the name of its file, without the ending.
        prompts, max_tokens: of the samples.
    """

    name: str
    about: str
    device: str
    gpu: str | None
    prompts: tuple[str, ...]
    max_tokens: int
    stages: tuple[Stage, ...]

    def dependents(self, names: Sequence[str]) -> list[str]:
        """Return the stages `names` and all that need one of them, directly or through others, in order."""
        found: list[str] = []
        for stage in self.stages:
            if stage.name in names or set(stage.needs) & set(found):
                found.append(stage.name)
        return found


@dataclass(frozen=True)
class Places:
    """The folders and the number of processes of a speedrun. gpus: 0 for the CPU."""

    out: Path
    downloads: Path
    gpus: int

    def folder(self, stage: str) -> Path:
        """Return the folder of a stage."""
        return self.out / stage

    def log(self, stage: str) -> Path:
        """Return the file with the output of a stage."""
        return self.out / "logs" / f"{stage}.log"


def builtin(gpus: int) -> Path:
    """Return the recipe for a number of GPUs. Raise ConfigError if there is none."""
    if gpus not in BY_GPUS:
        known = ", ".join(map(str, BY_GPUS))
        raise ConfigError(f"--gpus must be one of {known} without --recipe, got {gpus}; give --recipe FILE")
    return FOLDER / f"{BY_GPUS[gpus]}.toml"


def read(path: Path) -> Recipe:
    """Return the recipe of a TOML file.

    Raises ConfigError, in one line with the file's name, if it is not a recipe. The flags of the stages are checked by
    `check`.
    """
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
        return _parse(path.stem, content)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8") from None
    except ValueError as error:  # of TOML too
        raise ConfigError(f"{path}: {error}") from None


def _check_keys(content: dict[str, Any], keys: dict[str, Any], needed: Sequence[str], where: str) -> None:
    """Raise ConfigError for keys that are unknown, missing or of another type. where: for the message."""
    for key, value in content.items():
        if key not in keys:
            raise ConfigError(f"{where}unknown key {key!r}; there are {', '.join(keys)}")
        if not isinstance(value, keys[key]) or isinstance(value, bool):
            kinds = {str: "text", dict: "a table", list: "a list", int: "a whole number"}
            raise ConfigError(f"{where}{key} must be {kinds.get(keys[key], 'a number')}, got {value!r}")
    for key in needed:
        if not content.get(key):
            raise ConfigError(f"{where}{key} is needed")


def _parse(name: str, content: dict[str, Any]) -> Recipe:
    _check_keys(content, KEYS, ("device", "stages"), "")
    if content["device"] not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu or cuda, got {content['device']!r}")
    samples = content.get("samples", {})
    _check_keys(samples, SAMPLE_KEYS, (), "samples: ")
    for prompt in samples.get("prompts", ()):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(f"samples: prompts must be texts that are not empty, got {prompt!r}")
        check_text(prompt, "samples: a prompt")
    max_tokens = samples.get("max_tokens", 64)
    if max_tokens < 1:
        raise ConfigError(f"samples: max_tokens must be a whole number >= 1, got {max_tokens}")
    stages: list[Stage] = []
    for number, entry in enumerate(content["stages"], 1):
        if not isinstance(entry, dict):
            raise ConfigError(f"stages must be tables ([[stages]]), got {entry!r}")
        stages.append(_stage(entry, number, stages))
    return Recipe(
        name=name,
        about=content.get("about", ""),
        device=content["device"],
        gpu=content.get("gpu"),
        prompts=tuple(samples.get("prompts", ())),
        max_tokens=max_tokens,
        stages=tuple(stages),
    )


def _stage(entry: dict[str, Any], number: int, earlier: Sequence[Stage]) -> Stage:
    name = entry.get("name")
    where = f"stage {name}: " if isinstance(name, str) and name else f"stage {number}: "
    _check_keys(entry, STAGE_KEYS, ("name", "command"), where)
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", entry["name"]) or entry["name"] in RESERVED:
        raise ConfigError(
            f"stage {number}: name must have small letters, digits and hyphens, and not be {' or '.join(RESERVED)}, "
            f"got {entry['name']!r}"
        )
    known = {stage.name: stage for stage in earlier}
    if entry["name"] in known:
        raise ConfigError(f"{where}there are two stages of this name")
    if entry["command"] not in COMMANDS:
        raise ConfigError(f"{where}command must be one of {', '.join(COMMANDS)}, got {entry['command']!r}")
    seconds = entry.get("seconds")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ConfigError(f"{where}seconds must be a finite number > 0, got {seconds}")
    try:
        flags = tuple(shlex.split(entry.get("flags", ""), comments=True))
    except ValueError as error:
        raise ConfigError(f"{where}flags: {error}") from None
    stage = Stage(entry["name"], entry["command"], flags, entry.get("about", ""), seconds)
    for before, word in zip(("", *flags), flags, strict=False):
        if _name_of(word) in OWN_FLAGS:
            raise ConfigError(f"{where}{_name_of(word)} is given by the speedrun; leave it out")
        if _name_of(word) in REFUSED_FLAGS:
            raise ConfigError(f"{where}{_name_of(word)} is no flag of a stage")
        for placeholder in _PLACEHOLDER.findall(word):
            if placeholder == DOWNLOADS:
                continue
            if placeholder not in (*known, entry["name"]):
                names = ", ".join((*known, DOWNLOADS))
                raise ConfigError(f"{where}{{{placeholder}}} is no earlier stage; there are {names}")
            if "--checkpoint" in (_name_of(before), _name_of(word)) and not (
                placeholder in known and known[placeholder].is_run
            ):
                raise ConfigError(f"{where}--checkpoint must be a stage that trains, got {{{placeholder}}}")
    return stage


def _name_of(word: str) -> str:
    """Return the flag of a word of a command line, with hyphens and without its value, or "" for other words."""
    return word.partition("=")[0].replace("_", "-") if word.startswith("-") else ""


def arguments(stage: Stage, recipe: Recipe, places: Places) -> list[str]:
    """Return the arguments of a stage's command: the flags of the recipe, and those that a speedrun gives."""
    values = {name: str(places.folder(name)) for name in (*stage.needs, stage.name)}
    values[DOWNLOADS] = str(places.downloads)
    words = [_PLACEHOLDER.sub(lambda match: values[match[1]], word) for word in stage.flags]
    if stage.is_run:
        words += ["--out-dir", str(places.out), "--run", stage.name, "--resume", "auto", "--device", recipe.device]
    elif stage.command in MEASURES:
        words += ["--out", str(places.folder(stage.name)), "--resume", "--device", recipe.device]
    elif stage.command == "download":
        words += ["--out", str(places.downloads)]
    return words


def command_line(stage: Stage, recipe: Recipe, places: Places) -> list[str]:
    """Return the command line of a stage: by torchrun with several GPUs, if the command shares its work."""
    head, end = [sys.executable, "-m"], list[str]()
    if places.gpus > 1 and (stage.is_run or stage.command in MEASURES):
        head += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(places.gpus), "-m"]
        end = ["--"]
    return [*head, f"nanochat_native.{stage.command}", *end, *arguments(stage, recipe, places)]


def config_of(stage: Stage, recipe: Recipe, places: Places) -> TrainConfig | None:
    """Return the flags of a stage's command as its own parser reads them, for one that trains.

    Raises ConfigError, in one line with the stage's name, for flags that the command does not take.
    """
    args = arguments(stage, recipe, places)
    try:
        if stage.command in RUNS:
            config = parse(args, kind=RUNS[stage.command])
            if stage.is_run and isinstance(config, FinetuneConfig | ReinforceConfig) and config.checkpoint is None:
                raise ConfigError("--checkpoint is needed")
            return dataclasses.replace(config, resume=None) if stage.is_run else None
        if stage.command in MEASURES:
            parse_options(MEASURES[stage.command], stage.command, args).check()
        else:
            options = parse_options(downloads.Options, stage.command, args)
            if not options.datasets:
                raise ConfigError("the name of a dataset is needed")
            for name in options.datasets:
                downloads.find_dataset(name)
            if not (options.yes or options.offline):
                raise ConfigError("--yes or --offline is needed, because a stage cannot ask")
    except ValueError as error:
        raise ConfigError(f"stage {stage.name}: {error}") from None
    return None


def check(recipe: Recipe, places: Places) -> None:
    """Raise ConfigError for a stage whose flags its command does not take. Nothing is run."""
    for stage in recipe.stages:
        config_of(stage, recipe, places)
