"""How often the host waits for the GPU: at most once in a training step and once in a decoding step."""

import contextlib

import pytest
import torch

from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import clip_grad_norm_

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:nanochat_native.*served by plain torch")]

RUN_PACKAGES = ("tyro", "rustbpe", "tiktoken", "safetensors", "tqdm", "numpy")


@contextlib.contextmanager
def waits_are(mode):
    """Set what torch does when the host waits for the device: "error" or "default"."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def let_wait(patch, owner, name):
    """Let the host wait within calls of one function. Returns the list of their results."""
    results, real = [], getattr(owner, name)

    def call(*args, **kwargs):
        with waits_are("default"):
            results.append(real(*args, **kwargs))
        return results[-1]

    patch.setattr(owner, name, call)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [1e-3, 1e9])
def test_the_clip_does_not_wait_and_scales_as_on_the_cpu(cuda, dtype, max_norm):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 7), (33,), (64, 64))]
    mine, other = ([torch.nn.Parameter(torch.zeros_like(g, device=place)) for g in grads] for place in (cuda, "cpu"))
    for parameters in (mine, other):
        for parameter, gradient in zip(parameters, grads, strict=True):
            parameter.grad = gradient.clone().to(parameter.device)
    clip_grad_norm_(mine, 1e9)  # kernels are loaded
    with waits_are("error"):
        norm = clip_grad_norm_(mine, max_norm)
    assert norm.item() == pytest.approx(clip_grad_norm_(other, max_norm).item(), rel=1e-6)
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    for ours, theirs in zip(mine, other, strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=tolerance, atol=0)


def test_gradients_that_are_not_finite_are_left_alone(cuda):
    parameter = torch.nn.Parameter(torch.zeros(3, device=cuda))
    parameter.grad = torch.tensor([1.0, float("inf"), -2.0], device=cuda)
    assert not clip_grad_norm_([parameter], 0.5).isfinite()
    assert parameter.grad.tolist() == [1.0, float("inf"), -2.0]


def test_a_training_step_waits_once(cuda, tmp_path, monkeypatch):
    for package in RUN_PACKAGES:
        pytest.importorskip(package)
    from tiny_run import tiny_flags, write_text

    from nanochat_native.train import main
    from nanochat_native.training import trainer

    waited = let_wait(monkeypatch, trainer, "read_numbers")
    counts = []

    def step(run, batches, real=trainer.Trainer.train_step):
        before = len(waited)
        with waits_are("error" if run.step else "default"):  # the first step loads kernels and allocates state
            real(run, batches)
        counts.append(len(waited) - before)

    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    write_text(tmp_path / "text.jsonl")
    assert main(tiny_flags(tmp_path, device="cuda", backend="native", depth=1)) == 0
    assert counts == [1] * 8


def test_the_divisors_of_fine_tuning_do_not_wait(cuda):
    for package in RUN_PACKAGES:
        pytest.importorskip(package)
    from nanochat_native.runtime.distributed import World
    from nanochat_native.training.finetuning import Finetuning

    targets = torch.tensor([[1, -1, -1], [1, 2, 3]], device=cuda)
    micro_batches = [(targets, targets[:1]), (targets, targets[1:])]
    task = object.__new__(Finetuning)  # without its model and data
    with waits_are("error"):
        divisors = task.loss_divisors(micro_batches, World())
    assert [divisor.item() for divisor in divisors] == pytest.approx([4 / 1, 4 / 3])


def test_a_decoding_step_waits_once(cuda, require_native, monkeypatch):
    require_native("attention")
    pytest.importorskip("tiktoken")
    from nanochat_native.inference import engine as engine_module
    from nanochat_native.inference.sampling import Sampling

    model = GPT(GPTConfig.from_depth(1, vocab_size=300, sequence_len=32)).to(cuda)
    model.init_weights(seed=0)
    with torch.autocast("cuda", torch.bfloat16):
        engine = engine_module.Engine(model, None, slots=3)
    prompts = [[7, 8, 9], [4], [1, 2]]
    settings = [{"temperature": 0}, {"temperature": 1.0, "top_k": 5}, {"logprobs": 2, "repetition_penalty": 1.3}]

    def submit():
        return [engine.submit(prompt, Sampling(4, **each)) for prompt, each in zip(prompts, settings, strict=True)]

    expected = submit()
    while not engine.idle:
        engine.step()
    waited = let_wait(monkeypatch, engine_module, "read_logits")
    found = submit()
    steps = 0
    with waits_are("error"):
        while not engine.idle:
            engine.step()
            steps += 1
    assert [request.tokens for request in found] == [request.tokens for request in expected]
    assert [request.scored for request in found] == [request.scored for request in expected]
    assert len(waited) <= steps
