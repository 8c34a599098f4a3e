"""The environment of a command: ranks, devices, files, the console, signals and errors.

It may depend on `ops`. It exports no names, because `runtime.openmp` must be imported before torch.
"""
