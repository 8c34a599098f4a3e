// Describes a tensor in global memory and the boxes that are copied to the tensor copy engine. Host code.
#pragma once

#include <initializer_list>
#include <stdexcept>

#include "../kernels.h"
#include "ptx/primitives.cuh"

namespace nanochat::cuda {

// sizes and box: elements along each of 2 to 4 dimensions, innermost first; strides: bytes, of all but the innermost.
// address and strides are multiples of 16, rows of the box multiples of 16 bytes that fit the swizzle's width, the box
// at most 256 along each dimension. Throws std::runtime_error if the driver rejects the arguments.
inline device::TensorMap make_tensor_map(DType dtype, const void* address, std::initializer_list<int64_t> sizes,
                                         std::initializer_list<int64_t> strides, std::initializer_list<int32_t> box,
                                         device::Swizzle swizzle) {
    const auto rank = static_cast<int>(sizes.size());
    if (strides.size() + 1 != sizes.size() || box.size() != sizes.size()) {
        throw std::runtime_error("tensor map: sizes, strides and box do not fit");
    }
#ifdef __CUDACC__
    // Through the runtime, so that the module needs no libcuda to load.
    static const auto encode = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found;
        device::launch_check(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
            "tensor map");
        if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("tensor map: the driver is too old");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
    }();
    cuuint64_t global_sizes[5], global_strides[5];
    cuuint32_t box_sizes[5];
    const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
    for (int i = 0; i < rank; ++i) {
        global_sizes[i] = static_cast<cuuint64_t>(sizes.begin()[i]);
        box_sizes[i] = static_cast<cuuint32_t>(box.begin()[i]);
        if (i) global_strides[i - 1] = static_cast<cuuint64_t>(strides.begin()[i - 1]);
    }
    const CUtensorMapDataType type = dtype == DType::float32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                     : dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                               : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const CUtensorMapSwizzle width = swizzle == device::Swizzle::none      ? CU_TENSOR_MAP_SWIZZLE_NONE
                                     : swizzle == device::Swizzle::bytes32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                     : swizzle == device::Swizzle::bytes64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                           : CU_TENSOR_MAP_SWIZZLE_128B;
    device::TensorMap map;
    const CUresult status = encode(&map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(address), global_sizes,
                                   global_strides, box_sizes, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, width,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        throw std::runtime_error("tensor map: cuTensorMapEncodeTiled returns " + std::to_string(status));
    }
    return map;
#else
    return emulation::make_tensor_map(dtype, address, rank, sizes.begin(), strides.begin(), box.begin(), swizzle);
#endif
}

}   // namespace nanochat::cuda
