"""The environment of a command: ranks, devices, files, the console, signals and errors.

It depends on `ops` alone.
"""
