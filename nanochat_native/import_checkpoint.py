"""python -m nanochat_native.import_checkpoint: import a model of nanochat or transformers as a run folder.

Reads a checkpoint folder of nanochat (model_000650.pt, meta_000650.json and its tokenizer.pkl), of its first
architecture or today's, or a folder of transformers' NanoChat (config.json, safetensors, tokenizer.json). Nothing is
unpickled: weights are loaded with weights_only, and the tokenizer's pickle is read as data.
"""

import sys
from collections.abc import Sequence

from nanochat_native.interop.importing import MAX_LOGIT_CHANGE, Options, largest_logit_change, probe_tokens, read, write
from nanochat_native.model.functional import EPS
from nanochat_native.runtime.command import run_command


def run(options: Options) -> None:
    """Import the model and print its shape and the notes of the import."""
    source = read(options)
    notes = list(source.notes)
    if source.eps != EPS:
        tokens = probe_tokens(source.config)
        change = largest_logit_change(source, tokens)
        effect = f"rms_norm_eps changes from {source.eps:g} to {EPS:g}, which changes logits by up to {change:.1e}"
        if not change <= MAX_LOGIT_CHANGE:
            raise ValueError(f"{options.source}: {effect}; at most {MAX_LOGIT_CHANGE:g} is allowed")
        notes.append(f"{effect} (measured on {tokens.numel()} random tokens)")
    write(source, options.out)
    shape = source.config
    print(
        f"import   {options.out} | d{shape.n_layer}, width {shape.n_embd}, {shape.n_head} heads, vocabulary "
        f"{shape.vocab_size:,}" + (f" | step {source.step}" if source.step is not None else "")
    )
    for note in notes:
        print(f"note     {note}")
    print(f"sample   python -m nanochat_native.generate --checkpoint {options.out}")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code."""
    return run_command(Options, "import_checkpoint", args, run)


if __name__ == "__main__":
    sys.exit(main())
