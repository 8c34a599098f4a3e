"""python -m nanochat_native.export: a trained model as a folder that transformers opens with no code of ours.

    config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json  README.md

`--format safetensors` writes the weights under nanochat's names instead, with the shape of the model beside them.
"""

import sys
from collections.abc import Sequence

from nanochat_native.interop.transformers_export import Options, export, verify
from nanochat_native.runtime.command import run_command


def run(options: Options) -> None:
    """Exports, and verifies when asked."""
    if options.verify and options.format != "transformers":
        raise ValueError("--verify opens the folder with transformers; it takes --format transformers")
    export(options)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"export   {options.out} | {options.format}, {options.dtype}, {size / 1e6:.1f} MB")
    if options.verify:
        print(f"verified {verify(options)}")


def main(args: Sequence[str] | None = None) -> int:
    """Exports as `args` say, sys.argv's by default. Returns the exit code."""
    return run_command(Options, "export", args, run)


if __name__ == "__main__":
    sys.exit(main())
