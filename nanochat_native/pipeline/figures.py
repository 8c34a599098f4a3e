"""The figures of a stage that is done, from the files in its folder.

`scores` are what a stage measured, `facts` are what it did. Both map a name to a number.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from nanochat_native.pipeline.recipe import Places, Stage
from nanochat_native.runs import checkpoint, metrics_log, pictures, run_folder
from nanochat_native.runs.metrics_log import value_of

# Values of a run's last `val` record that are no scores.
_NO_SCORES = ("step", "seconds")
_NAMES = {"bpb": "bits per byte", "loss": "loss in nats a token"}
_NAMES_OF_REWARDS = {"reward": "mean reward", "ended": "share of answers that ended"}
_MEASURED = {"tokens": "targets", "bytes": "bytes"}


def of_stage(stage: Stage, folder: Path) -> dict[str, dict[str, float]]:
    """Return the scores and the facts of a stage. Raises OSError, ValueError, KeyError or TypeError for bad files."""
    if stage.is_run:
        return of_run(folder, " of conversations" if stage.command == "finetune" else "")
    if stage.command in ("evaluate", "chat_eval"):
        record = json.loads((folder / pictures.RESULT).read_bytes())
        return of_chat_tasks(record) if stage.command == "chat_eval" else of_evaluation(record)
    return {"scores": {}, "facts": {}}


def of_run(folder: Path, of_what: str = "") -> dict[str, dict[str, float]]:
    """Return the last validation of a run, its steps and speed; of rewards the validation before the first step too.

    of_what: added to the names of losses.
    """
    records = list(metrics_log.read(folder / "metrics.jsonl"))
    steps = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "val"]
    scores: dict[str, float] = {}
    if evaluations:
        scores = _scores(evaluations[-1], {name: text + of_what for name, text in _NAMES.items()} | _NAMES_OF_REWARDS)
        if "pass@1" in evaluations[0] and evaluations[0]["step"] == 0:
            first = {name: value for name, value in evaluations[0].items() if name in ("pass@1", "reward")}
            before = _scores(first, _NAMES_OF_REWARDS)
            scores = {f"{name} before": value for name, value in before.items()} | scores
    for kind, name in (("core", "CORE"), ("chat", "mean of chat tasks, centered")):
        last = next((record for record in reversed(records) if record["kind"] == kind), None)
        if last is not None and (value := value_of(last, "score")) is not None:
            scores[name] = value
    facts: dict[str, float] = {}
    if steps:
        facts["steps"] = steps[-1]["step"]
        loss = value_of(steps[-1], "loss")
        if loss is not None and "reward" not in steps[-1]:
            facts["last training loss in nats a token"] = loss
        speeds = [value for record in steps if (value := value_of(record, "tokens_per_second")) is not None]
        if speeds:
            facts["tokens a second, median"] = statistics.median(speeds)
    return {"scores": scores, "facts": facts}


def is_trained(stage: Stage, places: Places, since: float) -> bool:
    """Return whether a stage trains, and has written a checkpoint of its last step since a time in seconds."""
    folder = places.folder(stage.name)
    if not stage.is_run or not run_folder.is_run(folder):
        return False
    last = run_folder.load_config(folder).num_iterations
    if last not in checkpoint.steps(folder / "checkpoints"):
        return False
    return checkpoint.path_of(folder / "checkpoints", last).stat().st_mtime >= since


def of_evaluation(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return bits per byte, loss and CORE of a result of `evaluate`."""
    scores: dict[str, float] = {_NAMES[name]: record[name] for name in _NAMES if name in record}
    if record.get("core", {}).get("score") is not None:
        scores["CORE"] = record["core"]["score"]
    facts: dict[str, float] = {f"{name} measured": record[key] for name, key in _MEASURED.items() if key in record}
    return {"scores": scores, "facts": facts}


def of_chat_tasks(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the accuracies and ChatCORE of a result of `chat_eval`."""
    scores = {task["task"]: task["accuracy"] for task in record["tasks"]}
    if record["chatcore"] is not None:
        scores["ChatCORE"] = record["chatcore"]
    return {"scores": scores, "facts": {f"problems of {task['task']}": task["problems"] for task in record["tasks"]}}


def _scores(record: dict[str, Any], names: dict[str, str]) -> dict[str, float]:
    """Return the numbers of a `val` record by their names for a reader."""
    found = {names.get(name, name): value_of(record, name) for name in record if name not in _NO_SCORES}
    return {name: value for name, value in found.items() if value is not None}


def text(value: float) -> str:
    """Return a figure as text: whole numbers with separators, others with four decimals, or none if they are large."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.0f}"
