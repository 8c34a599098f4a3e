// The three products of a linear layer.
#include <omp.h>

#include "../kernels.h"
#include "gemm.h"
#include "runtime.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

template <Epilogue epilogue>
void linear_with(const cpu::Linear& args) {
    const int64_t N = args.N, I = args.I, O = args.O;
    const bool forward = args.form == cpu::LinearForm::forward;
    float *transposed, *scratch;
    const auto carve_workspace = [&](cpu::Arena arena) {
        transposed = arena.take<float>(forward ? I * O : 0);
        scratch = arena.take<float>(args.execution.threads * kScratch<float>);
        return arena.used;
    };
    carve_workspace({static_cast<char*>(cpu::workspace(carve_workspace({})))});
#pragma omp parallel num_threads(args.execution.threads)
    {
        float* own = scratch + omp_get_thread_num() * kScratch<float>;
        if (forward) {
            constexpr int64_t rows = 32;
#pragma omp for
            for (int64_t o = 0; o < O; o += rows)
                transpose(minimum(rows, O - o), I, args.b + o * I, I, transposed + o, O);
            const Product<float, float, float, float, epilogue> product = {
                .M = N,
                .N = O,
                .K = I,
                .a = args.a,
                .a_stride = I,
                .a_layout = Layout::rows,
                .b = transposed,
                .b_stride = O,
                .c = args.c,
                .c_stride = O,
            };
            multiply_team(product, args.execution.threads, own);
        } else {
            const bool grad_input = args.form == cpu::LinearForm::grad_input;
            const Product<float, float, float, float, epilogue> product = {
                .M = grad_input ? N : O,
                .N = I,
                .K = grad_input ? O : N,
                .a = args.a,
                .a_stride = O,
                .a_layout = grad_input ? Layout::rows : Layout::columns,
                .b = args.b,
                .b_stride = I,
                .c = args.c,
                .c_stride = I,
                .beta = 1,
                .source = args.add_to,
                .source_stride = I,
                .epilogue_y = args.x,
            };
            multiply_team(product, args.execution.threads, own);
        }
    }
}

}   // namespace

void linear(const cpu::Linear& args) {
    if (!args.relu_squared) return linear_with<Epilogue::none>(args);
    args.form == cpu::LinearForm::forward ? linear_with<Epilogue::relu_squared>(args)
                                          : linear_with<Epilogue::relu_squared_backward>(args);
}

}   // namespace nanochat::NANOCHAT_ISA
