import json
import math

import pytest
import torch
import torch.distributed as dist
from ranks import run
from tiny_run import losses, records, tiny_flags, train, write_text

from nanochat_native import ops
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.functional import add_norm, norm
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import clip_reduced_, setup_optimizers
from nanochat_native.runs import checkpoint
from nanochat_native.runtime.distributed import World
from nanochat_native.train import main
from nanochat_native.training import diagnosis, trainer
from nanochat_native.training.diagnosis import Diagnosis, activations, largest_logit, layer_of, orthogonality_error

CONFIG = GPTConfig(sequence_len=24, vocab_size=50, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL")
LAYERS = ["wte", "h.0", "h.1", "h.2", "lm_head"]


def build():
    model = GPT(CONFIG)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def tokens(seed=0):
    return torch.randint(50, (4, 25), generator=torch.Generator().manual_seed(seed))


def one_step(max_norm=math.inf, **options):
    """Return (model, weights before the step, gradients, quantities) of one step on one rank."""
    model = build()
    optimizers = setup_optimizers(model, **options)
    idx = tokens()
    model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm = clip_reduced_(optimizers, max_norm).item()
    diagnosis = Diagnosis(model, optimizers, World())
    diagnosis.begin(norm, max_norm)
    for optimizer in optimizers:
        optimizer.step()
    found = diagnosis.finish(tokens(1)[:2])
    assert diagnosis.count == 1
    assert diagnosis.seconds > 0
    return model, before, gradients, found


def norms_by_layer(tensors):
    squares = dict.fromkeys(LAYERS, 0.0)
    for name, tensor in tensors.items():
        squares[layer_of(name)] += tensor.double().square().sum().item()
    return {layer: math.sqrt(square) for layer, square in squares.items()}


def of(found, quantity):
    return {key.partition("/")[2]: value for key, value in found.items() if key.startswith(quantity + "/")}


@pytest.mark.parametrize("max_norm", [math.inf, 0.01])
@pytest.mark.parametrize("optimizer", ["hybrid", "adamw", "sgd"])
def test_norms_of_gradients_and_updates(max_norm, optimizer):
    model, before, gradients, found = one_step(max_norm, optimizer=optimizer)
    assert of(found, "gradient_norm") == pytest.approx(norms_by_layer(gradients), rel=1e-4)
    updates = norms_by_layer({name: p.detach() - before[name] for name, p in model.named_parameters()})
    assert of(found, "update_norm") == pytest.approx(updates, rel=1e-5)
    weights = norms_by_layer(before)
    ratios = {layer: updates[layer] / weights[layer] for layer in LAYERS}
    assert of(found, "update_to_weight") == pytest.approx(ratios, rel=1e-5)
    assert bool(of(found, "orthogonality_error")) == (optimizer == "hybrid")


def test_orthogonality_error_by_hand():
    generator = torch.Generator().manual_seed(0)
    for shape in [(5, 8), (8, 5), (6, 6)]:
        u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
        assert orthogonality_error((u @ v)[None]) < 1e-6
        values = torch.linspace(0.5, 1.5, min(shape))
        error = ((values**2 - 1).square().mean()).sqrt().item()
        assert orthogonality_error(((u * values) @ v)[None]) == pytest.approx(error, rel=1e-4)
    worst = torch.stack([torch.eye(4), 2 * torch.eye(4)])
    assert orthogonality_error(worst) == pytest.approx(3.0)


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_the_error_is_that_of_muons_update(steps):
    """Compare with the error of newton_schulz on the same momentum."""
    _, _, gradients, found = one_step(coefficients="cubic", ns_steps=steps)
    expected = {}
    for name, gradient in gradients.items():
        if name.startswith("transformer.h."):
            orthogonal = ops.newton_schulz(gradient, steps=steps, coefficients="cubic")
            layer = layer_of(name)
            expected[layer] = max(expected.get(layer, 0.0), orthogonality_error(orthogonal))
    assert of(found, "orthogonality_error") == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cautious": True},
        {"scale_decay": True},
        {"per_head": True},
        {"cautious": True, "per_head": True, "scale_decay": True},
    ],
)
def test_weight_decay_and_heads_are_taken_out_of_it(options):
    """Leave weight decay out of the update, and treat each head as a matrix."""
    _, _, _, found = one_step(coefficients="cubic", ns_steps=25, matrix_weight_decay=3.0, **options)
    _, _, _, plain = one_step(coefficients="cubic", ns_steps=25)
    assert len(of(found, "orthogonality_error")) == 3
    assert max(of(plain, "orthogonality_error").values()) < 0.6  # square matrices have small singular values
    if "per_head" not in options:
        assert of(found, "orthogonality_error") == pytest.approx(of(plain, "orthogonality_error"), rel=0.02, abs=1e-4)
    else:
        assert max(of(found, "orthogonality_error").values()) < 0.6


def test_attention_logits_against_every_pair():
    model = build()
    idx = tokens()[:2, :24]
    found = activations(model, idx)
    x = model.wte(idx)
    expected = {}
    x, n = add_norm(norm(x), None)
    cos, sin = model.cos[:, :24], model.sin[:, :24]
    for number, block in enumerate(model.blocks):
        q, k, _ = block.attn.project(n, cos, sin)
        largest = 0.0
        for row in range(2):
            for head in range(4):
                for i in range(24):
                    first = 0 if block.attn.window is None else max(0, i - block.attn.window)
                    for j in range(first, i + 1):
                        logit = (q[row, i, head] @ k[row, j, head // 2]).item() / math.sqrt(8)
                        largest = max(largest, abs(logit))
        expected[f"h.{number}"] = largest
        assert largest <= math.sqrt(8) * 1.001
        x, n = add_norm(*block(x, n, cos, sin))
    assert of(found, "attention_logit") == pytest.approx(expected, rel=1e-4)
    assert model.blocks[0].attn.window == 6
    assert largest_logit(model.blocks[0].attn, x, cos, sin) > 0


@pytest.mark.parametrize(("window", "expected"), [(None, 30.0), (3, 3.0)])
def test_pairs_that_no_query_sees_do_not_count(window, expected):
    """Give position 0 a key of 30 and the last one of 90; all queries are 1, but the last is 0."""
    attention = build().blocks[0].attn
    q, k = torch.zeros(1, 8, 4, 8), torch.zeros(1, 8, 2, 8)
    q[..., 0] = math.sqrt(8)
    q[:, -1] = 0
    k[..., 0] = 3.0
    k[:, 0, 1, 0], k[:, -1, 1, 0] = 30.0, 90.0
    q[:, : (window or 0) + 1, 2:] = 0 if window else math.sqrt(8)  # the queries that see position 0 through the window
    q[:, :, :, 1:] = 0
    attention.project = lambda x, cos, sin: (q, k, None)
    attention.window = window
    assert largest_logit(attention, None, None, None) == pytest.approx(expected)


def test_dead_units_are_counted():
    model = build()
    with torch.no_grad():
        weight = model.blocks[1].mlp.c_fc.weight
        weight[:32] = 0  # relu(0) is 0 for every token
    found = of(activations(model, tokens()[:, :24]), "dead_units")
    assert found["h.1"] == pytest.approx(32 / 128)
    assert found["h.0"] == found["h.2"] == 0
    assert not model.blocks[1].mlp._forward_pre_hooks


def gradient_norms():
    """Return the quantities of this rank, which has a part of the batch."""
    model = build()
    optimizers = setup_optimizers(model, process_group=dist.group.WORLD)
    world = World(dist.get_rank(), dist.get_world_size(), 0, dist.group.WORLD)
    idx = tokens()[world.rank :: world.size]
    model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous()).backward()
    norm = clip_reduced_(optimizers, 0.01).item()
    diagnosis = Diagnosis(model, optimizers, world)
    diagnosis.begin(norm, 0.01)
    for optimizer in optimizers:
        optimizer.step()
    return diagnosis.finish(tokens(1)[:2])


def test_ranks_see_what_one_process_sees():
    first, second = run(2, gradient_norms)
    _, _, _, alone = one_step(0.01)
    assert set(first) == set(alone)
    for quantity in ("gradient_norm", "update_norm", "attention_logit"):
        assert of(first, quantity) == pytest.approx(of(alone, quantity), rel=1e-3)
    assert set(second) == {key for key in alone if key.startswith("gradient_norm")}, "rank 0 alone looks at the rest"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosed")
    write_text(folder / "text.jsonl")
    return folder


def test_a_diagnosed_run_has_the_same_bits_and_a_report(folder, capsys):
    assert train(folder, run="plain") == 0
    assert train(folder, run="looked", diagnose=True, diagnose_every=3) == 0
    assert losses(folder / "runs" / "looked") == losses(folder / "runs" / "plain")
    found = records(folder / "runs" / "looked", "diagnosis")
    assert [record["step"] for record in found] == [3, 6]
    for quantity in ("gradient_norm", "update_norm", "update_to_weight"):
        assert {f"{quantity}/{layer}" for layer in ("wte", "h.0", "h.1", "lm_head")} <= set(found[0])
    for quantity in ("orthogonality_error", "attention_logit", "dead_units"):
        assert {f"{quantity}/h.0", f"{quantity}/h.1"} <= set(found[0])
    trained = records(folder / "runs" / "looked", "train")
    clipped = math.sqrt(sum(found[0][f"gradient_norm/{layer}"] ** 2 for layer in ("wte", "h.0", "h.1", "lm_head")))
    assert clipped == pytest.approx(trained[2]["grad_norm"], rel=1e-4)
    out = capsys.readouterr().out
    assert "diagnosis.png | measured 2 times" in out
    assert "% of the time" in out
    assert (folder / "runs" / "looked" / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "runs" / "plain" / "diagnosis.png").exists()


def test_a_diagnosed_run_of_todays_model_records_its_scalars(folder):
    flags = {"recipe": "today", "depth": 3, "steps": 3, "save_every": 3}
    assert train(folder, run="today-plain", **flags) == 0
    assert train(folder, run="today", diagnose=True, diagnose_every=3, **flags) == 0
    assert losses(folder / "runs" / "today") == losses(folder / "runs" / "today-plain")
    (found,) = records(folder / "runs" / "today", "diagnosis")
    tensors, _ = checkpoint.load(folder / "runs" / "today" / "checkpoints")
    for quantity in ("resid_lambda", "x0_lambda"):
        values = tensors["model"][f"{quantity}s"].tolist()
        assert of(found, quantity) == {f"h.{layer}": value for layer, value in enumerate(values)}
    for part in ("smear", "backout"):
        assert of(found, f"{part}_lambda") == {part: tensors["model"][f"{part}_lambda"].item()}
    assert {"value_embeds", "resid_lambdas", "x0_lambdas", "smear_gate"} <= set(of(found, "gradient_norm"))
    assert set(of(found, "update_norm")) == set(of(found, "gradient_norm"))
    assert set(of(found, "orthogonality_error")) == {"h.0", "h.1", "h.2"}
    assert max(of(found, "attention_logit").values()) <= 1.2**2 * math.sqrt(32) * 1.001


def test_tensorboard_has_the_scalars(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train(folder, run="board", diagnose=True, diagnose_every=4) == 0
    events = accumulator.EventAccumulator(str(folder / "runs" / "board" / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert "diagnosis/dead_units/h.1" in tags
    values = [event.value for event in events.Scalars("diagnosis/update_norm/wte")]
    logged = [r["update_norm/wte"] for r in records(folder / "runs" / "board", "diagnosis")]
    assert values == pytest.approx(logged, rel=1e-6)


def test_looking_may_be_turned_on_when_a_run_goes_on(folder, capsys):
    assert train(folder, run="later", steps=4) == 0
    assert main([*tiny_flags(folder, run="later", steps=8), "--resume", "auto", "--diagnose"]) == 0
    assert "may differ in the last bits" not in capsys.readouterr().out
    assert [r["step"] for r in records(folder / "runs" / "later", "diagnosis")] == [5, 6, 7, 8]


def test_a_skipped_step_is_not_looked_at(folder, monkeypatch):
    real = trainer.clip_reduced_
    count = iter(range(1, 1000))

    def clip(optimizers, max_norm, **options):
        if next(count) == 2:
            optimizers[1].param_groups[0]["params"][2].grad[0, 0] = float("nan")
        return real(optimizers, max_norm, **options)

    monkeypatch.setattr(trainer, "clip_reduced_", clip)
    assert train(folder, run="nan", steps=4, diagnose=True, diagnose_every=1) == 0
    assert [r["step"] for r in records(folder / "runs" / "nan", "diagnosis")] == [1, 3, 4]
    json.dumps(records(folder / "runs" / "nan", "diagnosis"), allow_nan=False)


def test_layers_have_short_names():
    assert layer_of("transformer.h.11.attn.c_q.weight") == "h.11"
    assert layer_of("transformer.wte.weight") == "wte"
    assert layer_of("lm_head.weight") == "lm_head"
    assert layer_of("value_embeds.11.weight") == "value_embeds"
    assert layer_of("smear_gate.weight") == "smear_gate"
    assert layer_of("x0_lambdas") == "x0_lambdas"
    assert diagnosis.ROWS >= 1
