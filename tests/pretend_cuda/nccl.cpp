// The collectives of the pretend device's tensors under NCCL's name. They carry the bytes through gloo.
//
// As with NCCL, a collective only begins when it is called, and its result is there for who has waited for it. Until then
// the result is poison. wait() throws if an input has changed, or something was written to the result, since the call.
#include <torch/csrc/utils/pybind.h>

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <cstring>

#include "torch_device.h"

namespace pretend {
namespace {

constexpr int kPoison = 0xFF;

using at::Tensor;
using c10d::Backend;
using c10d::Work;

// The bytes of a tensor, where the host finds them.
struct Bytes {
    char* first;
    int64_t count;
    bool holds(const char* byte) const { return first <= byte && byte < first + count; }
};

Bytes bytes_of(const Tensor& tensor) {
    TORCH_CHECK(tensor.is_cuda(), "nccl: tensors must be on a CUDA device, got ", tensor.device());
    TORCH_CHECK(tensor.is_contiguous(), "nccl: tensors must be contiguous");
    TORCH_CHECK(tensor.device().index() == current_device(), "nccl: the current device is ", current_device(),
                ", and a tensor is on ", tensor.device());
    return {static_cast<char*>(host(tensor.const_data_ptr())), static_cast<int64_t>(tensor.nbytes())};
}

Tensor to_host(const Tensor& tensor) {
    const Bytes bytes = bytes_of(tensor);
    const Tensor copy = at::empty(tensor.sizes(), tensor.options().device(at::kCPU));
    std::memcpy(copy.mutable_data_ptr(), bytes.first, bytes.count);
    return copy;
}

// One collective from its call to the first wait.
class Pending final : public Work {
  public:
    // `begin` gets a copy of the input, and the tensor for the result, both on the host.
    template <class Begin>
    Pending(c10d::OpType kind, int rank, const Tensor& input, const Tensor& output, Begin begin)
        : Work(rank, kind), input_(input), output_(output), sent_(to_host(input)) {
        // gloo may write to what it gets, and `sent_` is compared with the input later.
        result_ = at::empty(output.sizes(), output.options().device(at::kCPU));
        work_ = begin(sent_.clone(), result_);
        // An all-gather in place leaves the rank's own part as it is.
        const Bytes out = bytes_of(output), in = bytes_of(input);
        for (int64_t i = 0; i < out.count; ++i) {
            if (in.count >= out.count || !in.holds(out.first + i)) out.first[i] = static_cast<char>(kPoison);
        }
    }

    bool isCompleted() override { return !work_ || work_->isCompleted(); }
    bool isSuccess() const override { return true; }
    std::exception_ptr exception() const override { return nullptr; }
    std::vector<Tensor> result() override { return {output_}; }

    // Makes the current stream wait; the host does not.
    void synchronize() override { wait(kNoTimeout); }

    bool wait(std::chrono::milliseconds timeout) override {
        if (!work_) return true;
        work_->wait(timeout);
        work_.reset();
        const Bytes in = bytes_of(input_), out = bytes_of(output_);
        const char* sent = static_cast<const char*>(sent_.const_data_ptr());
        for (int64_t i = 0; i < in.count; ++i) {
            const bool in_place = in.count >= out.count && out.holds(in.first + i);
            TORCH_CHECK(in_place || in.first[i] == sent[i],
                        "nccl: the input of a collective was changed before it ended");
        }
        for (int64_t i = 0; i < out.count; ++i) {
            const bool in_place = in.count < out.count && in.holds(out.first + i);
            TORCH_CHECK(in_place || out.first[i] == static_cast<char>(kPoison),
                        "nccl: the result of a collective was written to before it ended");
        }
        std::memcpy(out.first, result_.const_data_ptr(), out.count);
        return true;
    }

  private:
    Tensor input_, output_, sent_, result_;
    c10::intrusive_ptr<Work> work_;
};

// gloo has no average: it adds, and then this divides, as NCCL does, in the type of the tensor.
class Divided final : public Work {
  public:
    Divided(c10::intrusive_ptr<Work> work, Tensor sum, int64_t first, Tensor result, int ranks)
        : work_(std::move(work)), sum_(std::move(sum)), result_(std::move(result)), first_(first), ranks_(ranks) {}
    bool isCompleted() override { return work_->isCompleted(); }
    bool wait(std::chrono::milliseconds timeout) override {
        work_->wait(timeout);
        result_.copy_(sum_.flatten().narrow(0, first_, result_.numel()).view(result_.sizes()));
        if (ranks_ > 1) result_.div_(ranks_);
        return true;
    }

  private:
    c10::intrusive_ptr<Work> work_;
    Tensor sum_, result_;
    int64_t first_;
    int ranks_;
};

class Nccl final : public Backend {
  public:
    explicit Nccl(c10::intrusive_ptr<Backend> gloo)
        : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}
    const std::string getBackendName() const override { return "nccl"; }
    void setSequenceNumberForGroup() override {}
    void shutdown() override { gloo_->shutdown(); }
    void abort() override { gloo_->abort(); }

    c10::intrusive_ptr<Work> allreduce(std::vector<Tensor>& tensors, const c10d::AllreduceOptions& options) override {
        TORCH_CHECK(tensors.size() == 1, "nccl: one tensor at a time");
        const Tensor& tensor = tensors[0];
        return begin(c10d::OpType::ALLREDUCE, tensor, tensor, [&](const Tensor& sent, const Tensor& result) {
            return add(sent, options.reduceOp, options.timeout, 0, result);
        });
    }

    c10::intrusive_ptr<Work> _reduce_scatter_base(Tensor& output, Tensor& input,
                                                  const c10d::ReduceScatterOptions& options) override {
        TORCH_CHECK(input.numel() == output.numel() * getSize() && input.scalar_type() == output.scalar_type(),
                    "nccl: the input must have the type of the output, and its elements for each rank");
        return begin(c10d::OpType::_REDUCE_SCATTER_BASE, input, output, [&](const Tensor& sent, const Tensor& result) {
            return add(sent, options.reduceOp, options.timeout, getRank() * result.numel(), result);
        });
    }

    c10::intrusive_ptr<Work> _allgather_base(Tensor& output, Tensor& input,
                                             const c10d::AllgatherOptions& options) override {
        TORCH_CHECK(output.numel() == input.numel() * getSize() && input.scalar_type() == output.scalar_type(),
                    "nccl: the output must have the type of the input, and its elements for each rank");
        return begin(c10d::OpType::_ALLGATHER_BASE, input, output,
                     [&](Tensor sent, Tensor result) { return gloo_->_allgather_base(result, sent, options); });
    }

  private:
    template <class Begin>
    c10::intrusive_ptr<Work> begin(c10d::OpType kind, const Tensor& input, const Tensor& output, Begin begin) {
        count("nccl " + c10d::opTypeToString(kind));
        const at::AutoDispatchBelowADInplaceOrView below;
        return c10::make_intrusive<Pending>(kind, getRank(), input, output, begin);
    }

    // Reduces `sent` over the ranks. The elements from `first` on become the result.
    c10::intrusive_ptr<Work> add(const Tensor& sent, const c10d::ReduceOp& op, std::chrono::milliseconds timeout,
                                 int64_t first, const Tensor& result) {
        const bool average = op == c10d::ReduceOp::AVG;
        c10d::AllreduceOptions options;
        options.reduceOp = average ? c10d::ReduceOp(c10d::ReduceOp::SUM) : op;
        options.timeout = timeout;
        std::vector<Tensor> tensors = {sent};
        return c10::make_intrusive<Divided>(gloo_->allreduce(tensors, options), sent, first, result,
                                            average ? getSize() : 1);
    }

    c10::intrusive_ptr<Backend> gloo_;
};

}   // namespace
}   // namespace pretend

PYBIND11_MODULE(_pretend_nccl, m) {
    m.def("create", [](c10::intrusive_ptr<c10d::Backend> gloo) -> c10::intrusive_ptr<c10d::Backend> {
        return c10::make_intrusive<pretend::Nccl>(std::move(gloo));
    });
}
