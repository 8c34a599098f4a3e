// Muon's update of a parameter, for the kernels that have the orthogonalised momentum.
#pragma once

#include "../kernels.h"
#include "ptx/primitives.cuh"

namespace nanochat::cuda {

struct UpdateRates {
    double lr, weight_decay, scale;
    const double *lr_address, *weight_decay_address;   // as MuonUpdate's
    bool cautious;
};

inline UpdateRates update_rates(const MuonUpdate& a) {
    return {
        .lr = a.lr,
        .weight_decay = a.weight_decay,
        .scale = a.scale,
        .lr_address = a.lr_address,
        .weight_decay_address = a.weight_decay_address,
        .cautious = a.cautious,
    };
}

struct Rates {
    float decay, rate;
    bool cautious;
};

NANOCHAT_DEVICE Rates rates_of(const UpdateRates& r) {
    const double lr = r.lr_address ? *r.lr_address : r.lr;
    const double weight_decay = r.weight_decay_address ? *r.weight_decay_address : r.weight_decay;
    return {static_cast<float>(1 - lr * weight_decay), static_cast<float>(lr * r.scale), r.cautious};
}

NANOCHAT_DEVICE float updated(float param, float update, const Rates& rates) {
    return (!rates.cautious || update * param >= 0 ? rates.decay : 1) * param - rates.rate * update;
}

}   // namespace nanochat::cuda
