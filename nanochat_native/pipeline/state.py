"""The state of a speedrun's folder, OUT/state.json: which stages are done, how, in what time, and their figures."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat_native.pipeline.recipe import Places, Recipe, Stage
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.files import listed, lock_folder, visible, write_atomically

FORMAT = "nanochat-native speedrun"
FILE = "state.json"
STARTED, DONE, DELETED = "started", "done", "deleted"


class State:
    """The stages of a folder that were started, by name. Every change is on the disk when a method returns.

    An entry has `status` (STARTED, DONE, or DELETED while its folder is being deleted), `words` (Stage.recorded),
    `command` (the command line), `attempts`, their `seconds` together, and if it is done `exit_code`, `figures` and
    perhaps `samples`. `running_since` is the time at which an attempt began that has not ended.
    """

    def __init__(self, places: Places) -> None:
        """Read the state of a folder, or begin an empty one.

        Raises ConfigError for a damaged state, and for a folder with other things in it.
        """
        self._places = places
        self.path = places.out / FILE
        self.stages: dict[str, dict[str, Any]] = {}
        try:
            content = json.loads(self.path.read_bytes())
            if content["format"] != FORMAT:
                raise ValueError("another program wrote it")
            self.stages = content["stages"]
            for entry in self.stages.values():
                _check(entry)
        except FileNotFoundError:
            _check_free(places.out)
        except NotADirectoryError:
            raise ConfigError(f"--out must be a folder, got {places.out}") from None
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self.path} is damaged ({type(error).__name__}: {error})") from None

    def save(self) -> None:
        """Write the file, replacing it atomically."""
        write_atomically(self.path, json.dumps({"format": FORMAT, "stages": self.stages}, indent=1) + "\n")

    def is_done(self, name: str) -> bool:
        """Return whether a stage is done."""
        return name in self.stages and self.stages[name]["status"] == DONE

    def changed(self, recipe: Recipe) -> list[Stage]:
        """Return the stages that were started with other words than those of the recipe."""
        return [
            stage
            for stage in recipe.stages
            if stage.name in self.stages and self.stages[stage.name]["words"] != stage.recorded()
        ]

    def check(self, recipe: Recipe, again: Sequence[str]) -> None:
        """Raise ConfigError for stages that must be done again, or whose folder is not theirs or is gone.

        again: the stages that `forget` will delete; they are not checked.
        """
        changed = [stage.name for stage in self.changed(recipe) if stage.name not in again]
        if changed:
            redone = [name for name in recipe.dependents(changed) if name in self.stages]
            raise ConfigError(
                f"the recipe has other flags for what was started in {self._places.out}: {', '.join(changed)}; "
                f"--redo {' '.join(changed)} deletes and does again {', '.join(redone)}"
            )
        for stage in recipe.stages:
            folder = self._places.folder(stage.name)
            if stage.name in again and stage.name in self.stages:
                continue
            if stage.name not in self.stages and folder.exists() and stage.command != "download":
                raise ConfigError(f"{folder} exists, but this speedrun did not make it; give another --out")
            if self.is_done(stage.name) and stage.command != "download" and not folder.exists():
                raise ConfigError(f"{folder} is gone; --redo {stage.name} makes it again")

    def forget(self, names: Sequence[str]) -> None:
        """Delete the folders of stages that were started, and what is known of them."""
        known = [name for name in dict.fromkeys(names) if name in self.stages]
        for name in known:
            self.stages[name]["status"] = DELETED
        self.save()
        for name in known:
            if self.stages[name]["words"][0] != "download":  # which has no folder of its own
                _delete(self._places.folder(name))
            self._places.log(name).unlink(missing_ok=True)
            del self.stages[name]
            self.save()

    def half_deleted(self) -> list[str]:
        """Return the stages whose folders an earlier `forget` has not deleted, because it was killed."""
        return [name for name, entry in self.stages.items() if entry["status"] == DELETED]

    def begin(self, stage: Stage, command: list[str]) -> None:
        """Record that an attempt at a stage begins.

        The folder of a stage that writes conversations is emptied, because it cannot be resumed. An attempt that did
        not end, because the speedrun was killed, counts up to its last output.
        """
        entry = self.stages.setdefault(
            stage.name, {"status": STARTED, "words": stage.recorded(), "seconds": 0.0, "attempts": 0}
        )
        self._close(stage.name, entry)
        entry |= {"command": command, "attempts": entry["attempts"] + 1, "running_since": time.time()}
        self.save()
        self._places.log(stage.name).parent.mkdir(exist_ok=True)
        folder = self._places.folder(stage.name)
        if stage.writes_chats:
            _delete(folder)
            folder.mkdir(parents=True)

    def _close(self, name: str, entry: dict[str, Any]) -> None:
        """Add the time of an attempt that did not end."""
        since = entry.pop("running_since", None)
        if since is not None:
            try:
                entry["seconds"] += max(0.0, self._places.log(name).stat().st_mtime - since)
            except OSError:
                return

    def end(self, name: str, seconds: float, exit_code: int, *, done: bool, figures: dict[str, Any]) -> None:
        """Record that an attempt at a stage has ended after `seconds`."""
        entry = self.stages[name]
        entry.pop("running_since", None)
        entry["seconds"] += seconds
        if done:
            entry |= {"status": DONE, "exit_code": exit_code, "figures": figures, "ended": time.time()}
        self.save()

    def add(self, name: str, **values: Any) -> None:
        """Add values to a stage."""
        self.stages[name] |= values
        self.save()


def _delete(folder: Path) -> None:
    """Delete a folder with its content, or a link to one, if it is there. Raises OSError."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _check(entry: dict[str, Any]) -> None:
    """Raise KeyError or TypeError for an entry that lacks what every one has."""
    if entry["status"] not in (STARTED, DONE, DELETED) or not isinstance(entry["words"], list):
        raise TypeError("a stage has no status or no words")
    entry["seconds"] + entry["attempts"]  # both are numbers
    if entry["status"] == DONE:
        entry["exit_code"], entry["figures"]["scores"].items(), entry["figures"]["facts"].items()


def _check_free(folder: Path) -> None:
    """Raise ConfigError for a folder without a state that is not empty, but for hidden files."""
    if folder.is_dir() and (names := visible(folder)):
        raise ConfigError(
            f"--out must be a new or an empty folder, or that of a speedrun, got {folder} with {listed(names)}"
        )


def lock(folder: Path) -> int:
    """Create a folder and lock it against other speedruns. Return the descriptor that holds the lock.

    Raises ConfigError if the folder cannot be made, or if another process has the lock.
    """
    try:
        return lock_folder(folder)
    except BlockingIOError:
        raise ConfigError(f"another speedrun is running in {folder}") from None
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made ({error.strerror})") from None
