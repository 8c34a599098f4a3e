// Arguments as in muon.cpp; coefficients lie on the host.
#include "../../../csrc/cuda/newton_schulz.cu"
#include "../../../csrc/cuda/newton_schulz_hopper.cu"

#include "device_reader.h"

using namespace nanochat;

static NewtonSchulz read_newton_schulz(Reader& read) {
    NewtonSchulz a = {};
    a.dtype = DType::float32;
    a.g = read;
    a.norms = read;
    a.scales = read;
    a.coefficients = read;
    a.steps = read;
    a.batch = read;
    a.M = read;
    a.K = read;
    a.norm_factor = read;
    return a;
}

// g, norms (batch) float64 or 0, scales (batch, M) float64 or 0, coefficients, steps, batch, M, K, norm_factor, form (0 plain, 1 gram), out or 0, list
// params, list copies or 0, param DType, lr, weight_decay, scale, cautious, lr_address, weight_decay_address, multiprocessors, hopper,
// workspace, its bytes
ENTRY(newton_schulz) {
    Reader read{arguments};
    NewtonSchulz a = read_newton_schulz(read);
    const int64_t form = read;
    a.form = static_cast<NewtonSchulzForm>(form);
    a.out = read;
    MuonUpdate update = {};
    update.params = static_cast<void**>(read);
    update.copies = static_cast<void**>(read);
    update.count = a.batch;
    update.numel = a.M * a.K;
    update.param_dtype = read;
    update.lr = read;
    update.weight_decay = read;
    update.scale = read;
    update.cautious = read;
    update.lr_address = read;
    update.weight_decay_address = read;
    if (!a.out) a.update = &update;
    a.execution.device = read_device(read);
    a.execution.workspace = read;
    require_workspace(read, cuda::newton_schulz_workspace_bytes(a));
    cuda::newton_schulz(a);
}

// As newton_schulz's, to norm_factor; then, on the host: (1,) int64 the form, (2,) int64 the bytes of workspace of
// each form, (2, steps) int64 the steps on one Gram matrix of each form, in turn, and (2,) int64 whether float16 serves
ENTRY(newton_schulz_plan) {
    Reader read{arguments};
    NewtonSchulz a = read_newton_schulz(read);
    int64_t *form = read, *bytes = read, *steps = read, *float16 = read;
    *form = static_cast<int64_t>(cuda::newton_schulz_form(a));
    for (const auto each : {NewtonSchulzForm::plain, NewtonSchulzForm::gram}) {
        a.form = each;
        *bytes++ = cuda::newton_schulz_workspace_bytes(a);
        const std::vector<int> phases = cuda::newton_schulz_kernels::restart_schedule(a, each);
        std::copy(phases.begin(), phases.end(), steps);
        steps += a.steps;
        *float16++ = cuda::newton_schulz_kernels::fits_float16(a, phases);
    }
}
