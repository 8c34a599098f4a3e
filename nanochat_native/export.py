"""python -m nanochat_native.export: export a trained model as a folder that transformers opens without extra code.

    config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json  README.md

With `--format safetensors` it writes the weights under nanochat's names, and the model's shape as a JSON file, instead.
With `--format nanochat` it writes a base directory of nanochat, which nanochat's own programs open:

    base_checkpoints/d20/model_000650.pt  meta_000650.json  tokenizer/tokenizer.pkl  token_bytes.pt
"""

import sys
from collections.abc import Sequence

from nanochat_native.interop.transformers_export import Options, export, verify
from nanochat_native.runtime.command import run_command


def run(options: Options) -> None:
    """Export the model. With --verify, also verify the folder."""
    if options.verify and options.format != "transformers":
        raise ValueError(f"--verify requires --format transformers, got {options.format}")
    types = export(options)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"export   {options.out} | {options.format}, {types}, {size / 1e6:.1f} MB")
    if options.verify:
        print(f"verified {verify(options)}")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code."""
    return run_command(Options, "export", args, run)


if __name__ == "__main__":
    sys.exit(main())
