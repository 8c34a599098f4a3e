"""python counted_training.py FLAGS: train, and write waits-RANK.json into --out-dir: the waits and collectives of each
step."""

import functools
import json
import os
import sys
from pathlib import Path

UNPINNED = "unpinned copy to device"  # which CUDA first copies on the host, while it waits


def count_waits(owner, name):
    """Replace a method by one that counts what its calls do to the device. Return the list of the counts.

    A count has what makes the host wait, "sync ...", the collectives, "nccl ...", and UNPINNED.
    """
    import pretend_device

    found = []
    method = getattr(owner, name)

    @functools.wraps(method)
    def counting(*args, **options):
        with pretend_device.counted() as calls:
            result = method(*args, **options)
        found.append({key: number for key, number in calls.items() if key.startswith(("sync ", "nccl ", UNPINNED))})
        return result

    setattr(owner, name, counting)
    return found


def waits(count):
    """Return the number of waits in such a count."""
    return sum(number for key, number in count.items() if key.startswith("sync "))


if __name__ == "__main__":
    from nanochat_native.train import main
    from nanochat_native.training.trainer import Trainer

    steps = count_waits(Trainer, "train_step")
    code = main()
    folder = Path(sys.argv[sys.argv.index("--out-dir") + 1])
    (folder / f"waits-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(steps))
    sys.exit(code)
