"""The pretend CUDA device in a process of its own: `import torch` finds it.

The device's library is loaded before torch, which asks for the CUDA hooks during its import and keeps the answer. After
torch, torch._C gets the functions that torch/cuda/*.py call, so that torch.cuda's own Python runs. After the package's
`ops`, its CUDA operators are loaded, with kernels that run on the emulation.

Tests use `counted`, `launches` and `check_memory`.
"""

import ctypes
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path

NAME = "NVIDIA H100 80GB HBM3 (pretend)"  # of a GPU that hardware.py knows
KIND = 1  # c10::DeviceType::CUDA
MOST_DEVICES = 8

device = None  # the module _pretend_cuda


def wait_for_torch():
    """Act when torch, and when the operators' Python side, is imported."""
    if "PRETEND_CUDA_LIBRARY" in os.environ:
        actions = {
            "torch": (_before_torch, _after_torch),
            "torch.distributed.distributed_c10d": (None, _after_distributed),
            "nanochat_native.ops.backends": (None, _after_backends),
        }
        sys.meta_path.insert(0, _Finder(actions))


class _Finder:
    def __init__(self, actions):
        self.actions = actions

    def find_spec(self, name, path=None, target=None):
        if name not in self.actions:
            return None
        before, after = self.actions.pop(name)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            if before:
                before(spec)
            run(module)
            after(module)

        spec.loader.exec_module = exec_module
        return spec


def _before_torch(spec):
    global device
    libraries = Path(spec.origin).parent / "lib"
    ctypes.CDLL(str(libraries / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    loader = importlib.machinery.ExtensionFileLoader("_pretend_cuda", os.environ["PRETEND_CUDA_LIBRARY"])
    device = importlib.util.module_from_spec(importlib.util.spec_from_loader("_pretend_cuda", loader))
    loader.exec_module(device)


def _after_torch(torch):
    for name, function in _functions().items():
        setattr(torch._C, name, function)
    cuda = torch.cuda
    # Chosen when torch.cuda was imported.
    cuda._exchange_device = cuda._maybe_exchange_device = device.exchange_device
    cuda._get_device_properties = _properties
    cuda._cudart = _Cudart
    cuda._is_in_bad_fork = lambda: False
    cuda._device_count_nvml = lambda: -1
    cuda._queued_calls.clear()  # checks of the capability against the build's list
    cuda.default_generators = tuple(map(torch.ops.pretend_cuda.default_generator, range(MOST_DEVICES)))
    torch.version.cuda = "13.0"
    torch.backends.cuda.is_built = lambda: True
    torch._C._has_cuda = torch.has_cuda = True
    cuda.graphs._cuda_isCurrentStreamCapturing = device.is_capturing
    cuda.Stream, cuda.Event, cuda.CUDAGraph = _classes(torch)
    cuda.streams.Stream, cuda.streams.Event, cuda.graphs.CUDAGraph = cuda.Stream, cuda.Event, cuda.CUDAGraph
    _replace_storages(torch)


def _functions():
    def set_stream(stream_id, device_index, device_type):
        device.set_device(device_index)
        device.set_stream(device_index, stream_id)

    return {
        "_cuda_getDeviceCount": device.device_count,
        "_cuda_init": lambda: None,
        "_cuda_getDevice": device.current_device,
        "_cuda_setDevice": device.set_device,
        "_cuda_exchangeDevice": device.exchange_device,
        "_cuda_maybeExchangeDevice": device.exchange_device,
        "_cuda_synchronize": device.synchronize,
        "_cuda_emptyCache": lambda: None,
        "_host_emptyCache": lambda: None,
        "_cuda_ipc_collect": lambda: None,
        "_cuda_isInBadFork": lambda: False,
        "_cuda_memoryStats": _memory_stats,
        "_cuda_resetPeakMemoryStats": device.reset_peak,
        "_cuda_resetAccumulatedMemoryStats": lambda index: None,
        "_cuda_getCurrentStream": lambda index: (device.current_stream(index), index, KIND),
        "_cuda_getDefaultStream": lambda index: (0, index, KIND),
        "_cuda_setStream": set_stream,
        "_cuda_getCurrentRawStream": device.native_stream,
        "_cuda_getArchFlags": lambda: "sm_80 sm_90",
        "_cuda_getCompiledVersion": lambda: 13000,
        "_cuda_sleep": lambda cycles: device.sleep(),
        "_cuda_set_sync_debug_mode": device.set_sync_debug_mode,
        "_cuda_get_sync_debug_mode": device.get_sync_debug_mode,
        "_cuda_getAllocatorBackend": lambda: "native",
        "_cuda_isCurrentStreamCapturing": device.is_capturing,
        "_cuda_canDeviceAccessPeer": lambda a, b: True,
    }


def _memory_stats(index):
    now, peak, allocations = device.statistics(index)
    size = {"current": now, "peak": peak, "allocated": 0, "freed": 0}
    none = dict.fromkeys(size, 0)
    names = ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes", "inactive_split_bytes")
    stats = {name: {"all": size, "small_pool": none, "large_pool": size} for name in names}
    stats["allocation"] = {"all": none | {"allocated": allocations}}
    return stats | {"num_alloc_retries": 0, "num_ooms": 0}


def _properties(index):
    major, minor = device.capability()
    return types.SimpleNamespace(
        name=NAME,
        major=major,
        minor=minor,
        total_memory=device.total_memory(),
        multi_processor_count=device.multiprocessors(),
        L2_cache_size=1 << 20,
        max_threads_per_multi_processor=2048,
        warp_size=32,
        regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        is_integrated=0,
        gcnArchName="",
        uuid="pretend",
        pci_bus_id=0,
        pci_device_id=index,
        pci_domain_id=0,
    )


class _Cudart:
    class cudaError:  # noqa: N801 (CUDA's name)
        success = 0

    @staticmethod
    def cudaMemGetInfo(index):  # noqa: N802
        return device.total_memory() - device.statistics(index)[0], device.total_memory()

    @staticmethod
    def cudaProfilerStart():  # noqa: N802
        return 0

    cudaProfilerStop = cudaProfilerStart  # noqa: N815


def _classes(torch):
    """Return torch.cuda's Stream and Event on torch's generic ones, and its CUDAGraph."""

    class Stream(torch.Stream):
        def __new__(cls, device=None, priority=0, **ids):
            if ids:
                return super().__new__(cls, **ids)
            index = torch.cuda._utils._get_device_index(device, optional=True)
            return super().__new__(cls, torch.device("cuda", index), priority=priority)

        @property
        def cuda_stream(self):
            return self.native_handle

        def record_event(self, event=None):
            event = event or Event()
            event.record(self)
            return event

        def wait_event(self, event):
            event.wait(self)

    class Event:  # torch.Event takes no subclass of its own in elapsed_time
        def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
            self.event = torch.Event("cuda", enable_timing=enable_timing)

        def record(self, stream=None):
            self.event.record(stream or torch.cuda.current_stream())

        def wait(self, stream=None):
            self.event.wait(stream or torch.cuda.current_stream())

        def query(self):
            return self.event.query()

        def synchronize(self):
            self.event.synchronize()

        def elapsed_time(self, end):
            return self.event.elapsed_time(end.event)

    class CUDAGraph:
        def __init__(self, keep_graph=False):
            self.number = None

        def capture_begin(self, pool=None, capture_error_mode="global", check_input_liveness=False):
            if device.current_stream(device.current_device()) == 0:
                raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
            device.begin_capture()

        def capture_end(self):
            self.number = device.end_capture()

        def instantiate(self):
            pass

        def replay(self):
            if self.number is None:
                raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
            device.replay(self.number)

        def reset(self):
            if self.number is not None:
                device.free_graph(self.number)
                self.number = None

        __del__ = reset

        def pool(self):
            return (0, self.number)

    return Stream, Event, CUDAGraph


def _replace_storages(torch):
    """Let storages move and be copied: UntypedStorage(device="cuda") is compiled out."""
    base, move = torch.storage._StorageBase, torch.storage._to
    clone = base.clone

    def new(size, place):
        return torch.empty(size, dtype=torch.uint8, device=place).untyped_storage()

    def to(storage, device, non_blocking=False):
        if device.type != "cuda" or storage.device == device:
            return move(storage, device, non_blocking)
        return new(storage.nbytes(), device).copy_(storage)

    def clone_anywhere(storage):
        if storage.device.type != "cuda":
            return clone(storage)
        return new(storage.nbytes(), storage.device).copy_(storage)

    torch.storage._to = to
    base.clone = torch.UntypedStorage.clone = clone_anywhere


def _after_distributed(c10d):
    """Put the collectives of nccl.cpp in the place of torch's ProcessGroupNCCL."""
    import torch

    class ByName(type):
        def __instancecheck__(cls, backend):
            return isinstance(backend, torch._C._distributed_c10d.Backend) and backend.name() == "nccl"

    class Options:
        """The attributes that torch sets, _timeout among them."""

    class ProcessGroupNCCL(metaclass=ByName):
        def __new__(cls, store, rank, size, options):
            return _collectives().create(c10d.ProcessGroupGloo(store, rank, size, timeout=options._timeout))

    ProcessGroupNCCL.Options = Options
    c10d.ProcessGroupNCCL, c10d._NCCL_AVAILABLE = ProcessGroupNCCL, True


def _collectives():
    loader = importlib.machinery.ExtensionFileLoader("_pretend_nccl", os.environ["PRETEND_CUDA_COLLECTIVES"])
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_pretend_nccl", loader))
    loader.exec_module(module)
    return module


def _after_backends(backends):
    if backends.load_error:
        return
    device.load(os.environ["PRETEND_CUDA_OPERATORS"])
    if not backends.build_info()["cuda"]:  # a build without nvcc
        info = backends.build_info() | {"cuda": "13.0", "cuda_architectures": "8.0 9.0a", "cuda_off": ""}
        backends.build_info = lambda: info
        for operator in backends.CUDA_OPERATORS:
            backends.DEVICES[operator] = ("cpu", "meta", "cuda")
    backends._C = _NativeModule(backends._C)


class _NativeModule:
    """`_C`, whose question to the CUDA runtime goes to the pretend device."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)

    def cuda_instruction_set(self):
        return "sm_90a" if device.is_hopper() else "sm_80"

    def cuda_versions(self):
        return 13000, 13000  # of the driver and of the runtime


# --- for tests ---


class counted:  # noqa: N801 (called as a function)
    """`with counted() as calls:`. Then calls[name] is how often a torch operator ran.

    calls["sync ..."] is how often the host would have waited for a GPU, calls["unpinned copy to device"] how often a
    copy that should not wait came from memory that is not pinned.
    """

    def __enter__(self):
        device.set_counting(True)
        self.calls = {}
        return self.calls

    def __exit__(self, *_):
        self.calls.update(device.counted())
        device.set_counting(False)


def launches():
    """Return how many of the project's kernels were launched so far."""
    return device.launches()


def load_operators(library, **variables):
    """Load operators in place of those of this checkout. They may read the variables."""
    import nanochat_native.ops  # noqa: F401  whose own are loaded before

    os.environ.update(variables)
    device.load(str(library))


def check_memory():
    """Raise RuntimeError if something was written outside of allocations, or to memory that was freed."""
    device.check_memory()


def call(pickled):
    """Call a function, for call_on_pretend_cuda."""
    import pickle

    import torch

    sys.path[:], function = pickle.loads(bytes.fromhex(pickled))
    torch.manual_seed(0)
    pickle.loads(function)()
    torch.cuda.synchronize()
    check_memory()
