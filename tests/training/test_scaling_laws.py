"""nanochat's scaling laws: against its own figures, and by hand."""

import dataclasses
import math

import pytest
import torch

from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.runs.config import TrainConfig, resolve_defaults, resolve_horizon
from nanochat_native.training import resolve, scaling_laws


def config(**flags):
    return resolve_defaults(TrainConfig(recipe="today", data="/some/text", **flags), gpu=True)


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_head": 1}, {"value_embeddings": False}, {"vocab_size": 300, "vocab_multiple": 64}]
)
def test_scaling_params_are_the_matrices_of_the_blocks_and_lm_head(changes):
    shape = GPTConfig.from_depth(5, vocab_size=512, sequence_len=64, head_dim=32, architecture="today")
    shape = dataclasses.replace(shape, **changes)
    with torch.device("meta"):
        named = dict(GPT(shape).named_parameters())
    counted = [p.numel() for name, p in named.items() if name.startswith(("transformer.h.", "lm_head."))]
    assert scaling_laws.scaling_params(shape) == sum(counted)
    assert sum(counted) < sum(p.numel() for p in named.values())


@pytest.mark.parametrize(
    ("depths", "exponent"), [([8], 18), ([10, 12, 14, 16], 19), ([18, 20, 22, 24, 26], 20), ([32, 40, 50], 21)]
)
def test_automatic_batches_are_nanochats(depths, exponent):
    for depth in depths:
        flags = config(depth=depth)
        assert flags.total_batch_size == -1
        assert resolve.with_batch(flags, resolve.model_config(flags)).total_batch_size == 2**exponent


def test_a_given_batch_stays_and_scales_rates_and_decay():
    """d24 at 2^20 tokens: the rates rise by sqrt(2), and the decay by sqrt(2) P_ref / P."""
    flags = config(depth=24, total_batch_size=2**20)
    shape = resolve.model_config(flags)
    assert resolve.with_batch(flags, shape) == flags
    ratio = 729_810_624 / 110_100_912  # of nanochat's parameters of d24 and d12, vocabulary 32768
    assert resolve.size_ratio(flags, shape) == pytest.approx(ratio, rel=1e-12)
    assert resolve.rate_factor(flags) == pytest.approx(math.sqrt(2))
    assert resolve.matrix_weight_decay(flags, shape) == pytest.approx(0.28 * math.sqrt(2) / ratio, rel=1e-12)


def test_the_reference_model_is_its_own_measure():
    flags = config(depth=12)
    shape = resolve.model_config(flags)
    flags = resolve.with_batch(flags, shape)
    assert flags.total_batch_size == 2**19
    assert resolve.size_ratio(flags, shape) == 1
    assert resolve.rate_factor(flags) == 1
    assert resolve.matrix_weight_decay(flags, shape) == 0.28


def test_the_reference_has_the_vocabulary_and_the_parts_of_the_run():
    flags = config(depth=6, head_dim=64, value_embeddings="off", n_kv_head=2)
    shape = dataclasses.replace(resolve.model_config(flags), vocab_size=50257)
    reference = GPTConfig.from_depth(
        12,
        vocab_size=50257,
        sequence_len=2048,
        head_dim=64,
        window_pattern="SSSL",
        architecture="today",
        value_embeddings=False,
    )
    expected = scaling_laws.scaling_params(shape) / scaling_laws.scaling_params(reference)
    assert resolve.size_ratio(flags, shape) == expected


def test_without_a_reference_batch_nothing_depends_on_the_batch():
    flags = config(depth=24, reference_batch_size=0)
    assert flags.total_batch_size == 524288
    assert resolve.rate_factor(flags) == 1
    assert resolve.matrix_weight_decay(flags, resolve.model_config(flags)) == 0.28


def test_the_factors_by_hand():
    assert scaling_laws.batch_size(1.0, 2**19) == 2**19
    assert scaling_laws.batch_size(2 ** (1 / 0.383), 2**19) == 2**20
    assert scaling_laws.batch_size(2 ** (0.49 / 0.383), 2**19) == 2**19
    assert scaling_laws.rate_factor(2**17, 2**19) == 0.5
    assert scaling_laws.decay_factor(2**17, 2**19, 0.25) == 2.0


def test_the_product_of_rate_decay_and_steps_is_that_of_the_reference():
    for batch, ratio in ((2**17, 0.1), (2**19, 1.0), (2**21, 30.0)):
        steps = ratio / batch
        product = scaling_laws.rate_factor(batch, 2**19) * scaling_laws.decay_factor(batch, 2**19, ratio) * steps
        assert product == pytest.approx(1 / 2**19)


@pytest.mark.parametrize(
    ("recipe", "steps"), [("today", 12 * 1_003_000 // 65536), ("october", round(12 * 1_003_000 / 65536))]
)
def test_the_last_part_of_a_batch_is_left_out(recipe, steps):
    flags = TrainConfig(recipe=recipe, total_batch_size=65536, target_param_data_ratio=12.0)
    assert 12 * 1_003_000 % 65536 > 65536 // 2, "the two roundings differ"
    assert resolve_horizon(flags, num_params=1_003_000, flops_per_token=1).num_iterations == steps


def test_the_horizon_is_12_tokens_a_parameter_on_a_gpu():
    flags = resolve.with_batch(config(depth=20), resolve.model_config(config(depth=20)))
    params = scaling_laws.scaling_params(resolve.model_config(flags))
    assert params == 435_160_240
    steps = resolve_horizon(flags, num_params=params, flops_per_token=1).num_iterations
    assert steps == 12 * params // 2**20 == 4980
