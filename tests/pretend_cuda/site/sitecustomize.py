"""Every interpreter with this folder in PYTHONPATH believes in the pretend CUDA device."""

import pretend_device

pretend_device.wait_for_torch()
