// An MPS device for a torch without one, in tests: memory, and torch's operators by the CPU's kernels.
//
// It refuses what a Mac refuses, and what gives wrong numbers on a Mac without an error:
// - Addresses of the device cannot be read by the host: they are off by kOffset.
// - A float64 tensor raises the TypeError that it raises on a Mac.
// - An operator without a kernel in torch's list for MPS (the file PRETEND_MPS_OPERATORS) raises NotImplementedError.
// - A copy between host and device must block: the memory of the host may be freed before it is read (pytorch's issue
//   189690). A copy to the host must not be of views with gaps and equal strides (issue 189961).
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

using at::Tensor;

const c10::Device kDevice(c10::kMPS, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::MPS);

// --- memory ---

constexpr uintptr_t kOffset = uintptr_t{1} << 62;   // no address of a process

void* host(const void* device) { return device ? reinterpret_cast<void*>(uintptr_t(device) - kOffset) : nullptr; }

struct Allocator final : c10::Allocator {
    size_t allocated = 0;   // in all

    c10::DataPtr allocate(size_t bytes) override {
        if (bytes == 0) return {nullptr, nullptr, &release, kDevice};
        void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
        TORCH_CHECK(memory, "MPS backend out of memory");
        std::memset(memory, 0xFF, bytes);   // NaN in every floating type; -1
        allocated += bytes;
        void* device = reinterpret_cast<void*>(uintptr_t(memory) + kOffset);
        return {device, device, &release, kDevice};
    }
    static void release(void* device) { std::free(host(device)); }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* target, const void* source, size_t bytes) const override {
        std::memcpy(host(target), host(source), bytes);
    }
};
Allocator allocator;
REGISTER_ALLOCATOR(c10::kMPS, &allocator)

// There is one device, with one stream, and work is done at once.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::kMPS> {
    c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
    c10::Device getDevice() const override { return kDevice; }
    c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
    c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(kDevice); }
    void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(MPS, Guard)

struct MPSHooks final : at::MPSHooksInterface {
    void init() const override {}
    bool hasMPS() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return 1; }
    c10::DeviceIndex getCurrentDevice() const override { return 0; }
    void setCurrentDevice(c10::DeviceIndex) const override {}
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
    void deviceSynchronize() const override {}
    size_t getDriverAllocatedMemory() const override { return allocator.allocated; }
    size_t getRecommendedMaxMemory() const override { return size_t{8} << 30; }
};
using at::MPSHooksRegistry;
using at::RegistererMPSHooksRegistry;
REGISTER_MPS_HOOKS(MPSHooks)

void check_type(at::ScalarType type) {
    TORCH_CHECK_TYPE(type != at::kDouble && type != at::kComplexDouble,
                     "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                     "Please use float32 instead.");
}

// --- operators ---

// A tensor over a storage, as `like` lies in its own.
Tensor over(c10::Storage storage, c10::DispatchKeySet keys, const Tensor& like, bool view = false) {
    Tensor made =
        view ? at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, std::move(storage), keys, like.dtype())
             : at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
    made.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
    return made;
}

// The arguments and results of one call, on either side.
class Call {
  public:
    explicit Call(const c10::OperatorHandle& op) : op_(op) {}

    void to_cpu(c10::IValue& value) {
        change(value, [this](const Tensor& t) { return to_cpu(t); });
        if (value.isDevice() && value.toDevice().is_mps()) value = c10::Device(c10::kCPU);
    }

    // Where the CPU's kernel has given an `out` another size, so has what it stands for.
    void to_mps(c10::IValue& value) {
        for (auto& [original, alias] : aliases_) take_size(original, alias);
        change(value, [this](const Tensor& t) { return to_mps(t); });
    }

  private:
    template <class Change>
    static void change(c10::IValue& value, Change&& to) {
        if (value.isTensor()) {
            value = to(value.toTensor());
        } else if (value.isTensorList()) {
            c10::List<Tensor> list;
            for (const Tensor& t : value.toTensorVector()) list.push_back(to(t));
            value = list;
        } else if (value.isOptionalTensorList()) {
            c10::List<std::optional<Tensor>> list;
            for (const std::optional<Tensor>& t : value.toOptionalTensorList().vec()) {
                list.push_back(t ? std::optional(to(*t)) : std::nullopt);
            }
            value = list;
        }
    }

    Tensor to_cpu(const Tensor& t) {
        if (!t.defined()) return t;
        if (!t.is_mps()) {
            const std::string& name = op_.schema().name();
            TORCH_CHECK(t.dim() == 0 || name == "aten::copy_" || name.find("index") != std::string::npos, name,
                        ": Expected all tensors to be on the same device, but found at least two devices, mps:0 and ",
                        t.device(), "!");
            return t;
        }
        const c10::Storage& storage = t.storage();
        c10::Storage& same = storages_[storage.unsafeGetStorageImpl()];
        if (!same) {
            same = c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(),
                                c10::DataPtr(host(storage.data()), c10::Device(c10::kCPU)),
                                c10::GetAllocator(c10::kCPU), true);
            originals_.emplace(same.unsafeGetStorageImpl(), storage);
        }
        Tensor alias = over(same, c10::DispatchKeySet(c10::DispatchKey::CPU), t);
        if (t.unsafeGetTensorImpl()->is_wrapped_number()) alias.unsafeGetTensorImpl()->set_wrapped_number(true);
        aliases_.emplace_back(t, alias);
        return alias;
    }

    Tensor to_mps(const Tensor& t) {
        if (!t.defined()) return t;
        for (const auto& [original, alias] : aliases_) {
            if (alias.is_same(t)) return original;
        }
        if (op_.schema().name() == "aten::copy_") return t;   // the CPU's side of it
        check_type(t.scalar_type());
        const auto known = originals_.find(t.storage().unsafeGetStorageImpl());
        if (known == originals_.end()) {
            const c10::Storage made = copied(t.storage());
            originals_.emplace(t.storage().unsafeGetStorageImpl(), made);
            kept_.push_back(t);   // so that no other storage gets the address of its own
            return over(made, kKeys, t);
        }
        for (const auto& [original, alias] : aliases_) {   // a view takes over the keys: inference mode looks at them
            if (original.storage().unsafeGetStorageImpl() == known->second.unsafeGetStorageImpl()) {
                return over(known->second, original.key_set(), t, true);
            }
        }
        return over(known->second, kKeys, t);
    }

    static c10::Storage copied(const c10::Storage& source) {
        const size_t bytes = source.nbytes();
        c10::Storage made(c10::Storage::use_byte_size_t(), bytes, allocator.allocate(bytes), &allocator, true);
        if (bytes) std::memcpy(host(made.data()), source.data(), bytes);
        return made;
    }

    static void take_size(const Tensor& original, const Tensor& alias) {
        if (alias.storage().data() != host(original.storage().data())) {
            auto* storage = original.storage().unsafeGetStorageImpl();
            c10::Storage made = copied(alias.storage());
            storage->set_data_ptr_noswap(std::move(made.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks()));
            storage->set_nbytes(alias.storage().nbytes());
        }
        if (alias.sizes() != original.sizes() || alias.strides() != original.strides()) {
            auto* impl = original.unsafeGetTensorImpl();
            impl->set_storage_offset(alias.storage_offset());
            impl->set_sizes_and_strides(alias.sizes(), alias.strides());
        }
    }

    const c10::OperatorHandle& op_;
    std::vector<std::pair<Tensor, Tensor>> aliases_;
    std::vector<Tensor> kept_;
    std::unordered_map<c10::StorageImpl*, c10::Storage> storages_, originals_;
};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    Call call(op);
    const size_t first = stack->size() - op.schema().arguments().size();
    for (size_t i = first; i < stack->size(); ++i) call.to_cpu((*stack)[i]);
    {
        const at::AutoDispatchBelowADInplaceOrView below;
        op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    }
    for (size_t i = first; i < stack->size(); ++i) call.to_mps((*stack)[i]);
}

bool has_kernel(const std::string& name) {
    static const auto* names = [] {
        auto* all = new std::unordered_set<std::string>;
        std::ifstream file(std::getenv("PRETEND_MPS_OPERATORS"));
        for (std::string line; std::getline(file, line);) all->insert(line);
        return all;
    }();
    return names->count(name) > 0;
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const std::string name = c10::toString(op.operator_name());
    TORCH_CHECK_NOT_IMPLEMENTED(has_kernel(name), "The operator '", name,
                                "' is not currently implemented for the MPS device.");
    run_on_cpu(op, stack);
}

void copy(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const Tensor target = stack->at(stack->size() - 3).toTensor(), source = stack->at(stack->size() - 2).toTensor();
    const bool crosses = target.is_mps() != source.is_mps(), blocks = !stack->back().toBool();
    TORCH_CHECK(blocks || !crosses, "a copy between the host and MPS does not block, and may copy freed memory");
    TORCH_CHECK(target.is_mps() || target.strides() != source.strides() || source.is_non_overlapping_and_dense(),
                "a copy from MPS of a view with gaps to one with equal strides copies the wrong elements");
    run_on_cpu(op, stack);
}

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool> pin_memory, std::optional<at::MemoryFormat> format) {
    TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
    check_type(c10::dtype_or_default(dtype));
    return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool> pin_memory) {
    TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
    check_type(c10::dtype_or_default(dtype));
    return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(dtype));
}

}   // namespace

TORCH_LIBRARY_IMPL(_, MPS, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, MPS, m) {
    m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&copy>());
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
}
