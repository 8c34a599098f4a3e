"""Every interpreter with this folder in PYTHONPATH has the pretend MPS device, which torch looks for in its import."""

import ctypes
import importlib.util
import os
from pathlib import Path

if "PRETEND_MPS_LIBRARY" in os.environ:
    libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    ctypes.CDLL(str(libraries / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(os.environ["PRETEND_MPS_LIBRARY"])
