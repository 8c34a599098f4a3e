"""python -m nanochat_native.chat: talk to a trained model in the terminal. --help lists flags, /help the commands."""

import io
import sys
from collections.abc import Sequence

from nanochat_native.data import conversations
from nanochat_native.inference.chat_session import Chat, Options, Terminal, show, talk
from nanochat_native.inference.engine import Engine
from nanochat_native.inference.sampling import check_sampling
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.command import check_text, run_command
from nanochat_native.runtime.hardware import autocast, pick_device


def run(options: Options) -> None:
    """Talks. Raises what load_model and check_sampling do, and ValueError for a prompt that does not fit."""
    check_sampling(options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    if options.max_tokens < 1:
        raise ValueError(f"--max-tokens is {options.max_tokens}; it takes a number from 1")
    check_text(options.system or "", "--system")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # check_text finds what is no text, a message at a time
    device = pick_device(options.device)
    terminal = Terminal()
    model, tokenizer, meta = load_model(options.checkpoint, options.step, device, warn=terminal.note)
    with autocast(device):
        engine = Engine(model, tokenizer, slots=1)
    chat_trained = conversations.is_chat_trained(meta)
    chat = Chat(engine, options, chat_trained=chat_trained, say=terminal.note)
    if not chat_trained:
        terminal.note(
            f"{options.checkpoint} is a base model: it was not trained to chat, and only continues what is written.\n"
            f"python -m nanochat_native.finetune --checkpoint {options.checkpoint} teaches it to answer."
        )
    if options.prompt is not None:
        show(chat, options.prompt)
        return
    if terminal.interactive:
        terminal.note(f"{options.checkpoint} step {meta['step']}. /help lists commands, Ctrl-D leaves.")
    with terminal.history():
        talk(chat, terminal)


def main(args: Sequence[str] | None = None) -> int:
    """Talks as `args` say, sys.argv's by default. Returns the exit code."""
    return run_command(Options, "chat", args, run)


if __name__ == "__main__":
    sys.exit(main())
