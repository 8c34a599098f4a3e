"""python -m nanochat_native.train: train a GPT. --help lists the flags.

Exit codes: 0 done; 1 failed or diverged; 2 a wrong flag, value or file; 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import json
import os
import sys
from collections.abc import Sequence

# OpenMP reads this when torch loads it. Threads that spin while they wait take the core from those they wait for when
# another program runs: on two cores, beside such a program, a step took 3.9 s spinning and 0.54 s sleeping; alone 0.32.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from nanochat_native.checkpoint import CheckpointError
from nanochat_native.config import ConfigError, to_json
from nanochat_native.metrics import Console
from nanochat_native.report import announce
from nanochat_native.run_folder import configure
from nanochat_native.trainer import Trainer


def main(args: Sequence[str] | None = None) -> int:
    """Train as `args` say, sys.argv's by default; a user's mistake is one line on stderr. Returns the exit code."""
    try:
        config, notes = configure(sys.argv[1:] if args is None else args)
        if config.print_config:
            print(json.dumps(to_json(config), indent=1))
            return 0
        try:
            trainer = Trainer(config, Console(as_json=config.json))
        except (ValueError, ImportError, OSError) as error:
            raise ConfigError(str(error)) from error
        announce(trainer, notes)
        return 0 if config.dry_run else trainer.train()
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        rows = trainer.config.device_batch_size
        advice = f"--device-batch-size {rows // 2}" if rows > 1 else "a shorter --max-seq-len or --grad-checkpoint"
        print(f"error: out of memory with --device-batch-size {rows}; try {advice} ({error})", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
