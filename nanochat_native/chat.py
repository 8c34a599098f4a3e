"""python -m nanochat_native.chat: chat with a trained model in the terminal."""

import io
import sys
from collections.abc import Sequence

from nanochat_native.data import conversations
from nanochat_native.inference.chat_session import Chat, Options, Terminal, repl, show
from nanochat_native.inference.engine import Engine
from nanochat_native.inference.sampling import check_sampling
from nanochat_native.model.quantization import check_quantization
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.command import check_text, run_command
from nanochat_native.runtime.hardware import autocast, pick_device


def run(options: Options) -> None:
    """Chat in the terminal, or answer one --prompt.

    Raises the errors of load_model and check_sampling, and ValueError for a prompt that does not fit.
    """
    check_sampling(options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    if options.max_tokens < 1:
        raise ValueError(f"--max-tokens must be a whole number >= 1, got {options.max_tokens}")
    check_text(options.system or "", "--system")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # check_text reports invalid text in each message
    device = pick_device(options.device)
    check_quantization(options.quantize, device)
    precision = autocast(device, options.dtype)
    terminal = Terminal()
    model, tokenizer, meta = load_model(options.checkpoint, options.step, device, warn=terminal.note)
    with precision:
        engine = Engine(model, tokenizer, slots=1, quantize=options.quantize)
    chat_trained = conversations.is_chat_trained(meta)
    chat = Chat(engine, options, chat_trained=chat_trained, say=terminal.note)
    if not chat_trained:
        terminal.note(
            f"{options.checkpoint} is a base model: it was not trained to chat and only continues text.\n"
            f"To train it to chat: python -m nanochat_native.finetune --checkpoint {options.checkpoint}"
        )
    if options.prompt is not None:
        show(chat, options.prompt)
        return
    if terminal.interactive:
        terminal.note(f"{options.checkpoint} step {meta['step']}. Type /help for the commands, Ctrl-D to quit.")
    with terminal.history():
        repl(chat, terminal)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code."""
    return run_command(Options, "chat", args, run)


if __name__ == "__main__":
    sys.exit(main())
