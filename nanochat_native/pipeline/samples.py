"""Answers of a model to the prompts of a recipe, by a process of its own: `python -m nanochat_native.pipeline.samples`.

Standard input has one JSON object: checkpoint, device, max_tokens and prompts. Standard output gets another: `answers`,
a text for each prompt, and `machine`, the name of the device.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native.data import conversations
from nanochat_native.inference.chat_session import Chat, Options, printable
from nanochat_native.inference.engine import Engine
from nanochat_native.pipeline.process import Signals, dies_with_parent
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime import hardware
from nanochat_native.runtime.isolation import describe

MODULE = "nanochat_native.pipeline.samples"


def ask(checkpoint: Path, device: str, prompts: tuple[str, ...], max_tokens: int, signals: Signals) -> dict[str, Any]:
    """Return the answers of the model of a run, its likeliest tokens, and the name of the device.

    Raises OSError with the last line of the process's messages if it fails.
    """
    job = {"checkpoint": str(checkpoint), "device": device, "prompts": prompts, "max_tokens": max_tokens}
    with subprocess.Popen(
        [sys.executable, "-m", MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
        preexec_fn=dies_with_parent(),
    ) as process:
        signals.process = process
        try:
            if signals.received:  # between the last look and the start
                process.send_signal(signals.received)
            out, err = process.communicate(json.dumps(job).encode())
        finally:
            signals.process = None
    if process.returncode:
        lines = err.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
        raise OSError(lines[-1])
    found: dict[str, Any] = json.loads(out)
    return found


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Return what the process writes for what it reads. Raises what load_model and Chat.answer do."""
    device = hardware.pick_device(job["device"])
    model, tokenizer, meta = load_model(job["checkpoint"], None, device, warn=lambda message: None)
    with hardware.autocast(device):
        engine = Engine(model, tokenizer, slots=1)
    options = Options(checkpoint=Path(job["checkpoint"]), max_tokens=job["max_tokens"], temperature=0.0, top_k=None)
    answers = []
    for prompt in job["prompts"]:
        chat = Chat(engine, options, chat_trained=conversations.is_chat_trained(meta), say=lambda note: None)
        answers.append(printable("".join(chat.answer(prompt))))
    return {"answers": answers, "machine": hardware.describe(device)}


def main() -> int:
    """Read a job, write the answers. Return 1 after a line on stderr if that fails."""
    try:
        print(json.dumps(answer(json.load(sys.stdin))))
    except Exception as error:
        print(describe(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
