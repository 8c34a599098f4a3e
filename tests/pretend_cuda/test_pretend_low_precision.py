"""Training in FP8 and in float16, and a GPU that is older than the CUDA kernels, on pretend CUDA devices."""

import contextlib
import functools
import io
import json
import math
import shutil

import pytest
from tiny_run import losses, records, tiny_flags, write_text

from pretend_cuda import on_pretend_cuda
from pretend_cuda.counted_training import count_waits, waits
from pretend_cuda.test_pretend_programs import (
    RANKS,
    TINY,
    assert_near,
    chat_flags,
    on_ranks,
    run,
    train,
    train_until_stopped,
    train_with,
)

# Of width 128, the least that FP8 takes. The emulated kernels of Muon would take most of the time.
FP8 = {"depth": 2, "device_batch_size": 4, "eval_every": 2, "save_every": 0, "optimizer": "adamw", "sample_every": 0}


def refused(folder, **flags):
    """Return the error of a run that is refused."""
    from nanochat_native.train import main

    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert main(tiny_flags(folder, **TINY | flags)) == 2
    assert not (folder / "runs").exists()
    return err.getvalue()


# --- FP8 ---


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@on_pretend_cuda(capability=(8, 9))
def test_fp8_follows_bfloat16_and_waits_once(tmp_path, recipe):
    from nanochat_native.training.trainer import Trainer

    write_text(tmp_path / "text.jsonl")
    train(tmp_path, run="bf16", steps=3, cuda_graphs="off", **FP8)
    steps = count_waits(Trainer, "train_step")
    out = train(tmp_path, run="fp8", steps=3, fp8=recipe, cuda_graphs="off", **FP8)
    assert f"fp8      {recipe}, 12 of 13 linear layers" in out
    assert [waits(step) for step in steps] == 3 * [1]
    bf16, fp8 = losses(tmp_path / "runs/bf16"), losses(tmp_path / "runs/fp8")
    assert_near(fp8, bf16, 2e-2)
    assert fp8 != bf16
    assert fp8[2][2] < 0.95 * fp8[0][2]
    train(tmp_path, run="again", steps=3, fp8=recipe, cuda_graphs="off", grad_checkpoint=True, **FP8)
    assert losses(tmp_path / "runs/again") == fp8


@on_pretend_cuda
def test_fp8_in_graphs_gives_the_same_bits_as_without_them(tmp_path):
    """In a run that resumes too: it evaluates, in bfloat16, only after the update was captured."""
    from nanochat_native.train import main

    write_text(tmp_path / "text.jsonl")
    for name, graphs in (("graphs", "on"), ("plain", "off")):
        flags = {"run": name, "fp8": "tensorwise", "cuda_graphs": graphs, **FP8}
        train(tmp_path, steps=1, **flags)
        resumed = tiny_flags(tmp_path, steps=5, **TINY | flags | {"eval_every": 3})
        run(main, *resumed, "--resume", "auto")
    assert losses(tmp_path / "runs/graphs") == losses(tmp_path / "runs/plain")
    assert [record["step"] for record in records(tmp_path / "runs/graphs", "val")] == [0, 1, 3, 5]


@on_pretend_cuda(capability=(8, 0))
def test_fp8_is_refused_on_a_gpu_without_it(tmp_path):
    write_text(tmp_path / "text.jsonl")
    assert refused(tmp_path, fp8="rowwise") == (
        "error: --fp8 must be off on H100 80GB HBM3 (pretend) sm_80, got rowwise: products in FP8 need a GPU of "
        "compute capability 8.9 or newer\n"
    )


FP8_ON_RANKS = RANKS | FP8 | {"device_batch_size": 2, "eval_every": 2, "fp8": "rowwise"}


@pytest.mark.slow
def test_two_ranks_train_in_fp8_as_one(tmp_path):
    """The scale of a row depends on no other row, so that only the sums of the gradients differ."""
    train_with(tmp_path=tmp_path, flags={"steps": 2, **FP8_ON_RANKS})
    on_ranks(tmp_path, 2, run="two", steps=2, **FP8_ON_RANKS)
    assert_near(losses(tmp_path / "runs/two"), losses(tmp_path / "runs/one"), 1e-2)


def finetune_flags(folder, steps):
    """The flags of finetune that train the run `base` further on the pretend device."""
    flags = ["--checkpoint", folder / "runs/base", "--device", "cuda", *chat_flags(folder)]
    return [*flags, "--save-every", 2, "--num-iterations", steps]


@pytest.mark.slow
@on_pretend_cuda
def test_fine_tuning_in_fp8_follows_bfloat16(tmp_path):
    from nanochat_native import finetune

    write_text(tmp_path / "text.jsonl")
    train(tmp_path, run="base", steps=1, **FP8 | {"max_seq_len": 32, "device_batch_size": 2})
    given = finetune_flags(tmp_path, 3)
    run(finetune.main, *given, "--run", "bf16")
    out = run(finetune.main, *given, "--run", "fp8", "--fp8", "rowwise")
    assert "fp8      rowwise, 12 of 13 linear layers" in out
    assert losses(tmp_path / "runs/fp8") != losses(tmp_path / "runs/bf16")
    assert_near(losses(tmp_path / "runs/fp8"), losses(tmp_path / "runs/bf16"), 2e-2)


@on_pretend_cuda
def test_fp8_is_refused_for_what_does_not_suit_it(tmp_path):
    write_text(tmp_path / "text.jsonl")
    message = refused(tmp_path, fp8="rowwise", dtype="float32")
    assert message == "error: --fp8 rowwise needs --dtype bfloat16, got float32\n"
    message = refused(
        tmp_path, fp8="rowwise", **FP8 | {"max_seq_len": 8, "total_batch_size": 8, "device_batch_size": 1}
    )
    assert message == ("error: --device-batch-size x --max-seq-len must be a multiple of 16 tokens with --fp8, got 8\n")
    assert "--fp8 must be off for this model, got rowwise: a linear layer in FP8 needs" in refused(
        tmp_path, fp8="rowwise", **FP8 | {"depth": 1}
    )


# --- float16 ---


@on_pretend_cuda(capability=(7, 5))
def test_float16_trains_and_resumes_exactly_on_a_gpu_without_bfloat16(tmp_path):
    import pretend_device

    from nanochat_native import ops
    from nanochat_native.training import loss_scaling
    from nanochat_native.training.trainer import Trainer

    write_text(tmp_path / "text.jsonl")
    loss_scaling.GROWTH_INTERVAL = 2  # so that the scale changes in the run
    flags = {"steps": 6, "eval_every": 2, "save_every": 2, "window_pattern": "SL", "depth": 2, "sample_every": 3}
    steps = count_waits(Trainer, "train_step")
    out = train(tmp_path, run="whole", **flags)
    assert " | float16" in out
    assert "graphs   off: --dtype is float16, whose loss scale changes between steps" in out
    assert [waits(step) for step in steps] == 6 * [1]
    scales = [record["loss_scale"] for record in records(tmp_path / "runs/whole", "train")]
    assert scales == [65536.0, 65536.0, 131072.0, 131072.0, 262144.0, 262144.0]
    assert pretend_device.launches() == 0
    assert ops.serves("attention", "cuda")[0] == "torch"

    train_until_stopped(tmp_path, run="stopped", **flags)
    train(tmp_path, run="stopped", resume="auto", **flags)
    whole, stopped = tmp_path / "runs/whole", tmp_path / "runs/stopped"
    assert losses(stopped) == losses(whole)
    assert [record["loss_scale"] for record in records(stopped, "train")] == scales

    train(tmp_path, run="cpu", **flags | {"device": "cpu", "sample_every": 0})
    assert_near(losses(whole), losses(tmp_path / "runs/cpu"), 3e-3)
    assert losses(whole)[5][2] < 0.8 * losses(whole)[0][2]


@on_pretend_cuda
def test_a_step_whose_gradients_overflow_is_skipped_and_not_counted(tmp_path):
    """The first scale, 2^120, is too large for all gradients."""
    from nanochat_native.train import main
    from nanochat_native.training import loss_scaling, trainer

    write_text(tmp_path / "text.jsonl")
    never = dict.fromkeys(("eval_every", "save_every", "sample_every"), 0)
    flags = {"dtype": "float16", "steps": 6, "max_skipped_steps": 2, **never}
    trainer.LossScale = functools.partial(loss_scaling.LossScale, 2.0**120)
    out = train(tmp_path, run="large", **flags)
    log = records(tmp_path / "runs/large", "train")
    assert [record["loss_scale"] for record in log] == [2.0 ** (120 - i) for i in range(6)]
    assert {record["skipped"] for record in log} == {0}
    assert {record["grad_norm"] for record in log} == {None}
    assert "step 1: the gradients overflow float16 at the loss scale 1.32923e+36: no update; the scale is 6.6" in out
    # No weight and no state of an optimizer has changed: each loss is that of the first weights on its batch.
    original = trainer.Trainer.update
    trainer.Trainer.update = lambda self: None
    trainer.LossScale = loss_scaling.LossScale
    train(tmp_path, run="still", **flags)
    trainer.Trainer.update = original
    assert [r["loss"] for r in log] == [r["loss"] for r in records(tmp_path / "runs/still", "train")]

    # Gradients that are not finite at the smallest scale end the run.
    trainer.LossScale = functools.partial(loss_scaling.LossScale, 2.0)
    compute = trainer.Trainer.compute_gradients
    trainer.Trainer.compute_gradients = lambda self, batch: (compute(self, batch)[0], math.inf)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        assert main(tiny_flags(tmp_path, run="bad", **TINY | flags)) == 1
    log = records(tmp_path / "runs/bad", "train")
    assert [(record["loss_scale"], record["skipped"]) for record in log] == [(2.0, 0), (1.0, 1), (1.0, 2)]


# --- a GPU that is older than the kernels ---


@on_pretend_cuda(capability=(7, 0))
def test_the_operators_of_an_old_gpu_are_near_their_references():
    import torch

    from nanochat_native import ops
    from nanochat_native.ops import reference

    q, k, v, dout = (torch.randn(2, 40, heads, 8, device="cuda").half() for heads in (4, 2, 2, 4))
    lengths = torch.tensor([40, 7], device="cuda")

    def gradients(function, tensors, dout, **options):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        out = function(*tensors, **options)
        return out, *torch.autograd.grad(out, tensors, dout)

    for options in ({}, {"window": 5}, {"causal": False}):
        ours = gradients(ops.attention, (q, k, v), dout, **options)
        exact = gradients(reference.attention, (q.double(), k.double(), v.double()), dout.double(), **options)
        for mine, theirs in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine.double(), theirs, atol=4e-3, rtol=4e-3)
    exact = reference.attention(q[:, :3].double(), k.double(), v.double(), lengths=lengths)
    torch.testing.assert_close(ops.attention(q[:, :3], k, v, lengths=lengths).double(), exact, atol=4e-3, rtol=4e-3)

    x, weight = torch.randn(50, 16, device="cuda").half(), torch.randn(300, 16, device="cuda").half()
    targets = torch.randint(-1, 300, (50,), device="cuda")
    scale = torch.tensor(1024.0, device="cuda")
    ours = gradients(ops.linear_cross_entropy, (x, weight), scale, targets=targets)
    exact = gradients(reference.linear_cross_entropy, (x.double(), weight.double()), scale.double(), targets=targets)
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine.double() - theirs).norm() < 2e-3 * theirs.norm()

    g = torch.randn(2, 48, 96, device="cuda")
    exact = reference.newton_schulz(g.double().cpu())
    error = (ops.newton_schulz(g).double().cpu() - exact).abs().max()
    assert 1e-5 < error < 4e-3, error  # in float16; bfloat16 is off by about 2e-2
    grown = ops.newton_schulz(g, coefficients=[(200.0, 0.0, 0.0)], steps=2)  # in float32
    torch.testing.assert_close(grown, 4e4 * g / g.norm(dim=(-2, -1), keepdim=True), rtol=1e-4, atol=1e-3)


@on_pretend_cuda(capability=(7, 0))
def test_the_doctor_names_what_serves_on_an_old_gpu():
    from nanochat_native import doctor
    from nanochat_native.ops import backends

    out = run(doctor.main)
    problem = "the CUDA kernels need compute capability 8.0 or newer, and this GPU has 7.0"
    assert "GPU 0: --dtype float16, --fp8 off" in out
    assert f"GPU 0: plain torch serves every operator: {problem}" in out
    assert out.count(f"cuda: torch ({problem})") == len(backends.CUDA_OPERATORS)


@on_pretend_cuda
def test_the_doctor_recommends_types():
    from nanochat_native import doctor

    assert "GPU 0: --dtype bfloat16, --fp8 tensorwise or rowwise" in run(doctor.main)


@on_pretend_cuda(capability=(7, 0))
def train_in_float16_on_one_rank(tmp_path):
    write_text(tmp_path / "text.jsonl")
    train(tmp_path, run="one", steps=3, **RANKS)


@pytest.mark.slow
def test_two_ranks_train_in_float16_as_one(tmp_path):
    train_in_float16_on_one_rank(tmp_path=tmp_path)
    out, ranks = on_ranks(tmp_path, 2, capability=(7, 0), run="two", steps=3, **RANKS)
    assert " | float16" in out
    assert [waits(step) for step in ranks[0]] == [1, 2, 1]  # the replicas are compared in the second
    assert_near(losses(tmp_path / "runs/two"), losses(tmp_path / "runs/one"), 1e-3)


@pytest.mark.slow
@on_pretend_cuda(capability=(7, 5))
def test_fine_tuning_in_float16_resumes_exactly(tmp_path):
    from nanochat_native import finetune

    write_text(tmp_path / "text.jsonl")
    train(tmp_path, run="base", steps=3, eval_every=3, max_seq_len=32)
    given = finetune_flags(tmp_path, 4)
    assert " | float16" in run(finetune.main, *given, "--run", "whole")
    run(finetune.main, *given, "--run", "resumed")
    shutil.rmtree(tmp_path / "runs/resumed/checkpoints/step_000004")
    run(finetune.main, *given, "--run", "resumed", "--resume", "auto")
    assert losses(tmp_path / "runs/resumed") == losses(tmp_path / "runs/whole")
    assert [record["loss_scale"] for record in records(tmp_path / "runs/whole", "train")] == 4 * [65536.0]


@on_pretend_cuda(capability=(7, 5))
def test_an_old_gpu_generates_in_float16(tmp_path):
    from nanochat_native import evaluate, generate

    write_text(tmp_path / "text.jsonl")
    train(tmp_path, run="base", steps=3, eval_every=3, max_seq_len=32)
    given = ["--checkpoint", tmp_path / "runs/base", "--device", "cuda"]
    text = run(generate.main, *given, "--prompt", "the ", "--max-tokens", 5)
    assert text.startswith("the ")
    gpu, cpu = (
        json.loads(run(evaluate.main, *given[:3], device, "--max-tokens", 128, "--json")) for device in ("cuda", "cpu")
    )
    assert gpu["bpb"] == pytest.approx(cpu["bpb"], rel=1e-3)
