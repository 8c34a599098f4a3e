// The Python module. Importing it registers the operators; build_info() returns what was built.
#include <pybind11/pybind11.h>

#include "../csrc/kernels.h"

PYBIND11_MODULE(_C, m) {
    m.def("build_info", [] {
        using pybind11::literals::operator""_a;
        return pybind11::dict(
            "version"_a = NANOCHAT_VERSION, "torch"_a = NANOCHAT_TORCH_VERSION, "compiler"_a = NANOCHAT_COMPILER,
            "instruction_sets"_a = nanochat::cpu::instruction_sets(), "cuda"_a = NANOCHAT_CUDA_VERSION,
            "cuda_architectures"_a = NANOCHAT_CUDA_ARCHITECTURES, "cuda_off"_a = NANOCHAT_CUDA_OFF);
    });
    m.def("instruction_set", &nanochat::cpu::instruction_set);
#ifdef NANOCHAT_WITH_CUDA
    m.def("cuda_instruction_set", [] { return nanochat::cuda::current_device().hopper ? "sm_90a" : "sm_80"; });
    m.def("cuda_versions", [] {
        const nanochat::cuda::Versions versions = nanochat::cuda::versions();
        return pybind11::make_tuple(versions.driver, versions.runtime);
    });
#endif
    m.def("linear_pays", &nanochat::cpu::linear_pays);
}
