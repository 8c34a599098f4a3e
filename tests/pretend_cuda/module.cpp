// The Python module _pretend_cuda: what __init__.py gives to torch._C and to tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <torch/library.h>

#include "torch_device.h"

namespace {

struct Silence final : c10::WarningHandler {
    void process(const c10::Warning&) override {}
};

int64_t (*launches)() = nullptr;
bool (*is_hopper)() = nullptr;

// Loads the operators, without torch's warning that they replace those of a module that was built with nvcc.
void load(const std::string& path) {
    Silence silence;
    const c10::WarningUtils::WarningHandlerGuard guard(&silence);
    void* library = dlopen(path.c_str(), RTLD_NOW);
    if (!library) throw std::runtime_error(dlerror());
    launches = reinterpret_cast<int64_t (*)()>(dlsym(library, "pretend_launches"));
    is_hopper = reinterpret_cast<bool (*)()>(dlsym(library, "pretend_is_hopper"));
}

}   // namespace

// An operator, since pybind11 does not know generators. Boxed: no schema is inferred from them.
void default_generator(const c10::OperatorHandle&, torch::jit::Stack* stack) {
    const int64_t device = torch::jit::pop(*stack).toInt();
    torch::jit::push(*stack, pretend::default_generator(device));
}
TORCH_LIBRARY(pretend_cuda, m) {
    m.def("default_generator(int device) -> Generator",
          torch::CppFunction::makeFromBoxedFunction<&default_generator>());
}

PYBIND11_MODULE(_pretend_cuda, m) {
    namespace p = pretend;
    using pybind11::call_guard, pybind11::gil_scoped_release;
    m.def("load", load);
    m.def("launches", [] { return launches(); });
    m.def("is_hopper", [] { return is_hopper(); });
    m.def("device_count", p::device_count);
    m.def("total_memory", p::total_memory);
    m.def("capability", [] { return std::pair(p::capability().major, p::capability().minor); });
    m.def("multiprocessors", p::multiprocessors);
    m.def("current_device", p::current_device);
    m.def("set_device", p::set_device);
    m.def("exchange_device", [](int device) {
        const int old = p::current_device();
        if (device >= 0) p::set_device(device);
        return old;
    });
    m.def("statistics", [](int device) {
        const p::Statistics& s = p::statistics(device);
        return std::tuple(s.current, s.peak, s.allocations);
    });
    m.def("reset_peak", [](int device) { p::statistics(device).peak = p::statistics(device).current; });
    m.def("check_memory", [] { p::check_memory(true); });

    m.def("current_stream", [](int device) { return p::current_place(device).stream; });
    m.def("set_stream", [](int device, int64_t stream) { p::set_stream({device, stream}); });
    m.def("native_stream",
          [](int device) { return reinterpret_cast<uintptr_t>(p::native_stream(p::current_place(device))); });
    m.def("synchronize", [] { p::synchronize_device(p::current_device()); }, call_guard<gil_scoped_release>());
    m.def("sleep", [] { p::sleep(p::current_place()); });

    m.def("set_sync_debug_mode", p::set_sync_debug_mode);
    m.def("get_sync_debug_mode", p::get_sync_debug_mode);
    m.def("set_counting", p::set_counting);
    m.def("counted", p::counted);

    m.def("is_capturing", [] { return p::capturing(p::current_place()); });
    m.def("begin_capture", p::begin_capture);
    m.def("end_capture", p::end_capture);
    m.def("replay", p::replay, call_guard<gil_scoped_release>());
    m.def("free_graph", p::free_graph);
}
