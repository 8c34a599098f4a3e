"""Runs every call of calls.py once on small shapes, for compute-sanitizer to watch."""

import torch
from calls import CALLS

torch.manual_seed(0)
for make in CALLS.values():
    make(torch.device("cuda"), small=True)()
torch.cuda.synchronize()
print("all calls ran")
