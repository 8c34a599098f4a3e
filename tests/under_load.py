"""Runs the suite beside busy loops, two a core: python tests/under_load.py [pytest's flags]. Exits as pytest does."""

import os
import subprocess
import sys
from collections.abc import Sequence

BUSY = """
import os, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
while True:
    pass
"""


def main(args: Sequence[str]) -> int:
    loops = [  # each ends with this process, however that ends: their input is a pipe that it alone holds
        subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE) for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        return subprocess.call([sys.executable, "-m", "pytest", "-q", *args])
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
