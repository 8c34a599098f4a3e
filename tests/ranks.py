"""Functions on several ranks of this machine: processes that talk over gloo."""

import io
import multiprocessing
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = 300  # ends a hang


def run(size, function, *args):
    """[function(*args) of each rank], called with a process group up. Raises what a rank raised, with its number."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanochat_native.train", "torch.distributed.checkpoint"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, size, store.port, results, function, args), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        packed = dict(results.get(timeout=TIMEOUT) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    found = {rank: torch.load(io.BytesIO(data), weights_only=False) for rank, data in packed.items()}
    errors = [f"rank {rank}: {value}" for rank, (failed, value) in sorted(found.items()) if failed]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [found[rank][1] for rank in range(size)]


def _rank(rank, size, port, results, function, args):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        outcome = (False, function(*args))
    except Exception:
        outcome = (True, traceback.format_exc())
    packed = io.BytesIO()  # a tensor by itself would travel as a handle of memory that ends with this process
    torch.save(outcome, packed)
    results.put((rank, packed.getvalue()))
    results.close()
    results.join_thread()
    dist.destroy_process_group()
