// The three products of a linear layer.
#include <omp.h>

#include "../kernels.h"
#include "gemm.h"
#include "runtime.h"

namespace nanochat::NANOCHAT_ISA {

void linear(const cpu::Linear& args) {
    const int64_t N = args.N, I = args.I, O = args.O;
    const bool forward = args.form == cpu::LinearForm::forward;
    float *transposed, *scratch;
    const auto lay_out = [&](cpu::Arena arena) {
        transposed = arena.take<float>(forward ? I * O : 0);
        scratch = arena.take<float>(args.threads * kScratch<float>);
        return arena.used;
    };
    lay_out({static_cast<char*>(cpu::workspace(lay_out({})))});
#pragma omp parallel num_threads(args.threads)
    {
        float* own = scratch + omp_get_thread_num() * kScratch<float>;
        if (forward) {
            constexpr int64_t rows = 32;
#pragma omp for
            for (int64_t o = 0; o < O; o += rows)
                transpose(minimum(rows, O - o), I, args.b + o * I, I, transposed + o, O);
            multiply_team(Product<float>{N, O, I, args.a, I, Layout::rows, transposed, O, args.c, O}, args.threads,
                          own);
        } else if (args.form == cpu::LinearForm::grad_input) {
            multiply_team(Product<float>{N, I, O, args.a, O, Layout::rows, args.b, I, args.c, I}, args.threads, own);
        } else {
            multiply_team(Product<float>{O, I, N, args.a, O, Layout::columns, args.b, I, args.c, I}, args.threads, own);
        }
    }
}

}   // namespace nanochat::NANOCHAT_ISA
