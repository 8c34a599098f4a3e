// The part of the CUDA runtime that a library calls which nvcc built with -cudart none. Device memory is the host's.
// harness.py sets what the next launches may touch by the functions at the end.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <fatbinary_section.h>

#include <cstdio>
#include <cstring>
#include <exception>

#include "ptx.h"

namespace {

struct Function {
    ptx::Module* module;
    std::string name;
    size_t dynamic_limit;   // of shared memory
};
std::unordered_map<const void*, Function>& functions() {
    static std::unordered_map<const void*, Function> all;   // by the stub on the host
    return all;
}

struct Configuration {
    dim3 grid, block;
    size_t shared_bytes;
    void* stream;
} configuration;
std::string message;
cudaError_t last = cudaSuccess;

cudaError_t error(cudaError_t code, const std::string& text) {
    message = text;
    last = code;
    return code;
}

// The current GPU, the shared memory that it gives to a block, and how often a kernel's limit was set.
int device = 0, device_limit = 0;
int64_t limits_set = 0;

size_t shared_limit(const ptx::Module& module) { return (module.architecture >= 90 ? 227 : 163) * 1024; }

void launch(const Function& function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
            const ptx::Options& options = {}) {
    ptx::Kernel& kernel = function.module->kernel(function.name);
    if (shared_bytes > function.dynamic_limit) {
        ptx::fail("%zu bytes of dynamic shared memory; %zu are allowed", shared_bytes, function.dynamic_limit);
    }
    const size_t all_shared = shared_bytes + static_cast<size_t>(kernel.static_shared);
    if (all_shared > shared_limit(*function.module)) ptx::fail("%zu bytes of shared memory", all_shared);
    ptx::launch(kernel, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, arguments, shared_bytes, options);
}

ptx::Options options_of(const cudaLaunchConfig_t& config) {
    ptx::Options options;
    for (unsigned n = 0; n < config.numAttrs; ++n) {
        const cudaLaunchAttribute& attribute = config.attrs[n];
        if (attribute.id == cudaLaunchAttributeClusterDimension) {
            const auto& size = attribute.val.clusterDim;
            if (size.y != 1 || size.z != 1) ptx::fail("a cluster of %u x %u x %u", size.x, size.y, size.z);
            options.cluster = size.x;
        } else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
            options.overlaps_previous = attribute.val.programmaticStreamSerializationAllowed;
        } else {
            ptx::fail("attribute %d of a launch", static_cast<int>(attribute.id));
        }
    }
    return options;
}

// The limits of NVIDIA's documentation of cuTensorMapEncodeTiled.
const char* refuse(const CUtensorMap* to, int element, cuuint32_t rank, const void* address, const cuuint64_t* sizes,
                   const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                   CUtensorMapSwizzle swizzle) {
    if (!element) return "type";
    if (rank < 1 || rank > 5) return "rank";
    if (reinterpret_cast<uintptr_t>(to) % 64) return "alignment of the map";
    if (reinterpret_cast<uintptr_t>(address) % 16) return "address";
    if (swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return "swizzle";
    for (cuuint32_t n = 0; n < rank; ++n) {
        if (sizes[n] == 0 || sizes[n] > 1ull << 32) return "size";
        if (box[n] == 0 || box[n] > 256) return "box";
        if (element_strides[n] != 1) return "element stride";
        if (n && (strides[n - 1] % 16 || strides[n - 1] >= 1ull << 40)) return "stride";
    }
    static const cuuint32_t kWidths[] = {1u << 30, 32, 64, 128};
    const cuuint32_t row = box[0] * static_cast<cuuint32_t>(element);
    if (row % 16) return "rows of the box are no multiple of 16 bytes";
    return row > kWidths[swizzle] ? "rows of the box are wider than the swizzle" : nullptr;
}

CUresult encode(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
    const bool is_half = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const int element = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : is_half ? 2 : 0;
    const char* why = refuse(to, element, rank, address, sizes, strides, box, element_strides, swizzle);
    if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) why = "mode";
    if (why) {
        fprintf(stderr, "cuTensorMapEncodeTiled: %s\n", why);
        return CUDA_ERROR_INVALID_VALUE;
    }
    ptx::TensorMap map{};
    map.mark = ptx::TensorMap::kMark;
    map.address = reinterpret_cast<uint64_t>(address);
    map.rank = static_cast<uint8_t>(rank);
    map.type = static_cast<uint8_t>(type);
    map.element = static_cast<uint8_t>(element);
    map.swizzle = static_cast<uint8_t>(swizzle);
    for (cuuint32_t n = 0; n < rank; ++n) {
        map.sizes[n] = sizes[n];
        map.strides[n] = n ? strides[n - 1] : static_cast<uint64_t>(element);
        map.box[n] = static_cast<uint16_t>(box[n]);
    }
    memset(to, 0, sizeof *to);
    memcpy(to, &map, sizeof map);
    return CUDA_SUCCESS;
}

}   // namespace

extern "C" {

// --- what nvcc calls ---

void** __cudaRegisterFatBinary(void* wrapper) {
    try {
        return reinterpret_cast<void**>(
            new ptx::Module(ptx::find_ptx(static_cast<__fatBinC_Wrapper_t*>(wrapper)->data)));
    } catch (const std::exception& e) {
        fprintf(stderr, "%s\n", e.what());
        std::terminate();   // while a library is loaded, no caller can catch it
    }
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** module, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    functions()[stub] = {reinterpret_cast<ptx::Module*>(module), name, 48 * 1024};
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream) {
    configuration = {grid, block, shared_bytes, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared_bytes = configuration.shared_bytes;
    *static_cast<void**>(stream) = configuration.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
    return functions().count(stub) ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                               cudaStream_t) {
    const auto found = functions().find(stub);
    if (found == functions().end()) return error(cudaErrorInvalidDeviceFunction, "no such kernel");
    try {
        launch(found->second, grid, block, arguments, shared_bytes);
    } catch (const std::exception& e) {
        return error(cudaErrorLaunchFailure, found->second.name + ": " + e.what());
    }
    return cudaSuccess;
}

// --- what the kernels' host code calls ---

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
    const auto found = functions().find(stub);
    if (found == functions().end()) return error(cudaErrorInvalidDeviceFunction, "no such kernel");
    try {
        launch(found->second, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
               options_of(*config));
    } catch (const std::exception& e) {
        return error(cudaErrorLaunchFailure, found->second.name + ": " + e.what());
    }
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
    const auto found = functions().find(stub);
    if (found == functions().end()) return error(cudaErrorInvalidDeviceFunction, "no such kernel");
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return error(cudaErrorInvalidValue, "attribute");
    if (static_cast<size_t>(value) > shared_limit(*found->second.module)) {
        return error(cudaErrorInvalidValue, std::to_string(value) + " bytes of shared memory");
    }
    found->second.dynamic_limit = static_cast<size_t>(value);
    ++limits_set;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* number) {
    *number = device;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return error(cudaErrorInvalidValue, "attribute");
    *value = device_limit;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    const cudaError_t code = last;
    last = cudaSuccess;
    return code;
}
const char* cudaGetErrorName(cudaError_t code) {
    return code == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaError";
}
const char* cudaGetErrorString(cudaError_t) { return message.c_str(); }
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
    const bool is_known = std::string(symbol) == "cuTensorMapEncodeTiled";
    *entry = is_known ? reinterpret_cast<void*>(encode) : nullptr;
    *found = is_known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

// --- what harness.py calls ---

// Also forgets the error of an earlier call, which the next launch would report.
void ptx_prepare(uint64_t seed, uint32_t misalignment, int gpu, int shared_limit) {
    last = cudaSuccess;
    device = gpu;
    device_limit = shared_limit;
    ptx::schedule() = {seed, misalignment};
    ptx::regions().clear();
}
void ptx_allow(uint64_t address, uint64_t bytes) { ptx::regions().push_back({address, address + bytes}); }
int64_t ptx_limits_set() { return limits_set; }
void ptx_write_costs(const char* path) { ptx::costs_file() = path; }
}
