"""What every program needs around its work: ranks, devices, the console, signals, errors, files.

It depends on `ops` alone.
"""
