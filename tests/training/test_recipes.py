"""Runs of nanochat's recipe of July 2026: what reaches the optimizers, and that the runs are as exact as October's."""

import dataclasses
import json
import math
import shutil

import pytest
import ranks
import torch
import torch.distributed as dist
from tiny_run import losses, records, tiny_flags, train, write_text

from nanochat_native import finetune
from nanochat_native.model.config import ARCHITECTURES
from nanochat_native.optim import Muon, routing
from nanochat_native.runs import checkpoint
from nanochat_native.runs.config import MUON_SWITCHES, RECIPES, parse, resolve_device
from nanochat_native.runs.run_folder import load_config
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.console import SilentConsole
from nanochat_native.runtime.distributed import World
from nanochat_native.training import report, resolve
from nanochat_native.training.pretraining import Pretraining
from nanochat_native.training.trainer import Trainer

STEPS = 6
SCALARS = ("smear_lambda", "backout_lambda", "resid_lambdas", "x0_lambdas")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    write_text(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """The run folder of a run of today's recipe."""
    assert run(folder, "whole") == 0
    return folder / "runs" / "whole"


def today(**changes):
    return {
        "recipe": "today",
        "packing": "bestfit",
        "depth": 3,
        "warmup_steps": 2,
        "steps": STEPS,
        "save_every": 3,
        "eval_every": 3,
    } | changes


def run(folder, name, **changes):
    return train(folder, run=name, **today(**changes))


def trainer_of(folder, task=None, world=None, **changes):
    flags = tiny_flags(folder, **today(run="none", **changes))
    return Trainer(resolve_device(parse(flags)), SilentConsole(), world, task)


def groups_of(trainer):
    return {group["param_names"][0]: group for each in trainer.optimizers for group in each.param_groups}


def test_the_table_of_flags_is_that_of_the_optimizers():
    for name, recipe in routing.RECIPES.items():
        values = RECIPES[name]
        defaults = {"beta2": 0.95, "coefficients": "quintic"} | dict.fromkeys(MUON_SWITCHES, False)
        options = {option: value for option, value in (defaults | recipe.muon).items() if not option.endswith("_eps")}
        given = {option: values[option] == "on" for option in MUON_SWITCHES}
        given |= {"beta2": values["normuon_beta2"], "coefficients": values["ns_coefficients"]}
        assert given == options
        assert values["matrix_weight_decay"] == recipe.matrix_weight_decay
        assert values["architecture"] in ARCHITECTURES


def test_the_groups_have_nanochats_rates_betas_and_decays(folder):
    """A batch of a sixteenth of the reference: b is 1/4. The width is 192: r is 2."""
    trainer = trainer_of(folder, reference_batch_size=128 * 16)
    r, b = 2.0, 0.25
    expected = {
        "lm_head.weight": (0.008 * r * b, (0.8, 0.96), 0.01),
        "transformer.wte.weight": (0.3 * r * b, (0.8, 0.995), 0.001),
        "value_embeds.0.weight": (0.15 * r * b, (0.8, 0.995), 0.01),
        "resid_lambdas": (0.005 * b, (0.8, 0.95), 0.05),
        "x0_lambdas": (0.5 * b, (0.96, 0.95), 0.0),
        "smear_lambda": (0.2, (0.8, 0.95), 0.0),
    }
    assert trainer.model.config.n_embd == 192
    found = groups_of(trainer)
    (matrices,) = (group for group in found.values() if "momentum" in group)
    for group in found.values():
        if group is matrices:
            continue
        name = next(name for name in expected if name in group["param_names"])
        rate, betas, decay = expected.pop(name)
        assert (group["initial_lr"], group["weight_decay"]) == (pytest.approx(rate), decay)
        assert tuple(group["betas"]) == betas
    assert not expected
    ratio = resolve.size_ratio(trainer.config, trainer.model.config)
    assert matrices["initial_lr"] == pytest.approx(0.02 * b)
    assert matrices["initial_weight_decay"] == pytest.approx(0.28 * b / ratio)
    assert (matrices["beta2"], matrices["coefficients"], matrices["ns_steps"]) == (0.9, "polar_express", 5)
    assert all(matrices[name] is True for name in MUON_SWITCHES)


def test_given_options_reach_the_optimizers(folder):
    trainer = trainer_of(
        folder,
        scalar_lr=0.1,
        weight_decay=0.3,
        matrix_weight_decay=0.5,
        normuon="off",
        scale_decay="off",
        normuon_beta2=0.7,
    )
    found = groups_of(trainer)
    assert found["x0_lambdas"]["initial_lr"] == 0.1
    assert {group["weight_decay"] for group in found.values()} == {0.3, 0.5}
    (matrices,) = (group for group in found.values() if "momentum" in group)
    assert (matrices["normuon"], matrices["scale_decay"], matrices["beta2"]) == (False, False, 0.7)


def test_each_step_sets_rate_momentum_and_decay(folder):
    """Compare with nanochat's rules, written out here: 10 steps, 2 of warmup, 4 to the full momentum, 6 of warmdown."""
    trainer = trainer_of(folder, steps=10, momentum_warmup_steps=4)
    seen = []

    def record():
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                muon = isinstance(optimizer, Muon)
                seen.append((group["lr"] / group["initial_lr"], group["momentum"] if muon else None))
                if muon:
                    decays.append(group["weight_decay"] / group["initial_weight_decay"])

    decays = []
    trainer.update = record
    batches = iter([trainer.loader.batch(step) for step in range(10)])
    trainer._log_step = lambda *values: None
    for it in range(10):
        seen.clear()
        trainer.train_step(batches)
        warmdown = round(0.65 * 10)
        rate = (it + 1) / 2 if it < 2 else 1.0 if it <= 10 - warmdown else 0.05 + 0.95 * (10 - it) / warmdown
        momentum = 0.97
        if it < 4:
            momentum = 0.85 + 0.12 * it / 4
        elif it >= 10 - warmdown:
            momentum = 0.97 - 0.07 * (it - (10 - warmdown)) / warmdown
        assert [pair[0] for pair in seen] == pytest.approx([rate] * len(seen))
        assert [pair[1] for pair in seen if pair[1] is not None] == [pytest.approx(momentum)]
    assert decays == pytest.approx([0.5 * (1 + math.cos(math.pi * it / 10)) for it in range(10)])


def test_a_run_learns_and_its_config_says_how(whole):
    config = load_config(whole)
    assert (config.recipe, config.architecture, config.packing, config.normuon) == ("today", "today", "bestfit", "on")
    model, _, meta = load_model(whole)
    assert model.config.parts_beyond("today") == []
    assert model.config.window_pattern == "SSSL"
    found = [loss for kind, _, loss in losses(whole) if kind == "val"]
    assert found[-1] < found[0] - 0.5
    tensors, _ = checkpoint.load(whole / "checkpoints")
    assert set(SCALARS) <= set(tensors["model"])
    assert meta["model_config"]["value_embeddings"] is True


def same_run(one, other):
    assert losses(one) == losses(other)
    (tensors, _), (expected, _) = checkpoint.load(one / "checkpoints"), checkpoint.load(other / "checkpoints")
    for group in ("model", "optimizer"):
        assert tensors[group].keys() == expected[group].keys()
        assert all(torch.equal(tensors[group][name], expected[group][name]) for name in expected[group])


def test_a_resumed_run_is_the_same_run(folder, whole):
    """Go on from the checkpoint of the third step of a finished run."""
    resumed = folder / "runs" / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_000006")
    assert run(folder, "resumed", resume="auto") == 0
    same_run(resumed, whole)


def test_recomputed_activations_change_no_bit(folder, whole):
    assert run(folder, "recomputed", grad_checkpoint=True) == 0
    same_run(folder / "runs" / "recomputed", whole)


class Started(Pretraining):
    """Weights with which the gradients of the scalars are more than rounding, which they are while c_proj is 0."""

    def init_weights(self, model, seed):
        super().init_weights(model, seed)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("c_proj.weight") or name in ("smear_lambda", "lm_head.weight"):
                    parameter.normal_(0, 0.1, generator=generator)


def losses_on_a_rank(folder):
    world = None
    if dist.is_initialized():
        group, background = dist.group.WORLD, dist.new_group(backend="gloo")
        world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), group, background)
    trainer = trainer_of(folder, Started(), world, device_batch_size=1, grad_clip=1.0)
    found = []
    for step in range(STEPS):
        trainer.step = step
        loss, norm = trainer.compute_gradients(trainer.loader.batch(step))
        trainer._set_schedules()
        trainer.update()
        trainer.zero_grad()
        found.append((loss, norm))
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    return found, weights


def test_two_ranks_train_as_one_process(folder):
    """Three scalars and one on two ranks: rows that the ranks cannot divide evenly."""
    expected, weights = losses_on_a_rank(folder)
    first, second = ranks.run(2, losses_on_a_rank, folder)
    assert first[0] == second[0]
    assert [loss for loss, _ in first[0]] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert [norm for _, norm in first[0]] == pytest.approx([norm for _, norm in expected], rel=1e-3)
    for name in weights:
        assert torch.equal(first[1][name], second[1][name])
    for name in SCALARS:
        torch.testing.assert_close(first[1][name], weights[name], rtol=1e-3, atol=1e-4)


def test_the_announcement_names_what_the_laws_count(folder, capsys):
    flags = {"recipe": "today", "run": "dry", "dry_run": True, "depth": 3}
    assert train(folder, **flags) == 0
    assert "1.4M of them in matrices and lm_head" in capsys.readouterr().out
    assert train(folder, **flags | {"recipe": "october"}) == 0
    assert "of them" not in capsys.readouterr().out


def test_the_horizon_counts_matrices_and_lm_head(folder):
    trainer = trainer_of(folder, steps=-1, target_param_data_ratio=0.01)
    named = trainer.model.named_parameters()
    counted = sum(p.numel() for name, p in named if name.startswith(("transformer.h.", "lm_head.")))
    assert trainer.config.num_iterations == int(0.01 * counted) // 128
    assert report.describe_run(trainer.setup)


def test_fine_tuning_keeps_the_recipe_and_the_model_of_the_base(folder, whole, capsys):
    chats = folder / "chats.jsonl"
    messages = [{"role": "user", "content": "who are you?"}, {"role": "assistant", "content": "a tensor."}]
    chats.write_text((json.dumps({"messages": messages}) + "\n") * 8)
    flags = ["--checkpoint", whole, "--data", chats, "--val-data", chats, "--cache-dir", folder / "cache"]
    flags += ["--out-dir", folder / "runs", "--run", "chat", "--device", "cpu", "--num-iterations", 4]
    flags += ["--batch-rows", 4, "--sample-every", 0, "--save-every", 2, "--max-seq-len", 32]
    torch.set_num_threads(1)
    assert finetune.main(list(map(str, flags))) == 0, capsys.readouterr()
    config = load_config(folder / "runs" / "chat")
    assert (config.recipe, config.architecture, config.normuon, config.smear) == ("today", "today", "on", "on")
    assert (config.matrix_weight_decay, config.final_lr_frac, config.momentum_final) == (0.0, 0.0, 0.95)
    rates = {"embedding_lr": 0.03, "unembedding_lr": 0.0008, "matrix_lr": 0.002, "scalar_lr": 0.05}
    assert resolve.learning_rates(config) == pytest.approx(rates)
    assert resolve.smear_rate(config) == pytest.approx(0.02)
    found = [record["loss"] for record in records(folder / "runs" / "chat", "train")]
    assert found[-1] < found[0]
    model, _, _ = load_model(folder / "runs" / "chat")
    assert dataclasses.asdict(model.config) == dataclasses.asdict(load_model(whole)[0].config)
