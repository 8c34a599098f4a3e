"""A dozen faults of a training run, each with its curve and the check that finds it (chapter 13).

Each fault is a patch of a few lines. A small model is trained with it and without it on Python's own source code, and a
check of a few lines is made of the program with it and without it. The check is a property: something that must hold
for every model and every text, so that it needs no training.
"""

import contextlib
import functools
import math
import statistics
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native import ops
from nanochat_native.data import Batch, BatchLoader, Corpus, TokenStream
from nanochat_native.data.sources import find_source
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.model import gpt
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT, Attention
from nanochat_native.optim import AdamW, clip_grad_norm_, setup_optimizers
from nanochat_native.runs import checkpoint
from nanochat_native.runs.config import TrainConfig, resolve_device
from nanochat_native.runs.metrics_log import SilentLog
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.console import SilentConsole
from nanochat_native.training import trainer as trainer_module
from nanochat_native.training.diagnosis import largest_logit
from nanochat_native.training.pretraining import Pretraining
from nanochat_native.training.trainer import Trainer

STEPS, LAST = 40, 10  # steps of a run; the last ones, whose mean loss is compared
INTRUSION = 20  # the step at which the tokenizer changes, and at which the gradient is NaN
OVERFIT_STEPS = 12
SEEDS = 5  # healthy runs, from other weights and on the same batches
SEEN = 3.0  # a curve is seen to be wrong if its end is this many standard deviations of the healthy runs away
VOCABULARY, LENGTH, ROWS = 1024, 128, 8
DECAY = 0.1
TEXT_BYTES = 1 << 20

Patch = AbstractContextManager[Any]


# --- data and model ---


@functools.cache
def _texts(skip: int = 0) -> tuple[str, ...]:
    """Return the first files of Python's standard library that have TEXT_BYTES together, after `skip` of them."""
    texts: list[str] = []
    size = 0
    for path in find_source(None).files[skip:]:
        text = path.read_text(encoding="utf-8", errors="replace")
        texts.append(text)
        size += len(text)
        if size > TEXT_BYTES:
            break
    return tuple(texts)


@functools.cache
def own_tokenizer() -> Tokenizer:
    """Return the tokenizer of the run."""
    return Tokenizer.train(_texts(), VOCABULARY)


@functools.cache
def other_tokenizer() -> Tokenizer:
    """Return a tokenizer of the same size, trained on other files."""
    return Tokenizer.train(_texts(len(_texts())), VOCABULARY)


@functools.cache
def _corpus(other: bool = False) -> Corpus:
    """Return the text as tokens of the run's tokenizer, or of the other one; the last tenth is for validation."""
    tokenizer = other_tokenizer() if other else own_tokenizer()
    tokens = [token for text in _texts() for token in (tokenizer.bos_id, *tokenizer.encode(text))]
    stream = TokenStream([np.array(tokens, dtype=np.uint16)])
    train, val = stream.split_at(len(stream) * 9 // 10)
    return Corpus(tokenizer, tokenizer.vocab_size, train, val, "standard library", (), tokenizer.hash, None)


def _config(**flags: Any) -> TrainConfig:
    config = TrainConfig(
        recipe="october",
        depth=2,
        vocab_size=VOCABULARY,
        max_seq_len=LENGTH,
        total_batch_size=ROWS * LENGTH,
        device_batch_size=2,
        num_iterations=STEPS,
        eval_every=0,
        diagnose=True,
        diagnose_every=STEPS,
        device="cpu",
    )
    return resolve_device(replace(config, **flags))


def _trainer(**flags: Any) -> Trainer:
    """Return a run on the small text that writes nothing."""
    trainer = Trainer(_config(**flags), SilentConsole(), task=Pretraining(_corpus()))
    trainer.log = Diagnoses()
    return trainer


class Diagnoses(SilentLog):
    """Keeps the records of --diagnose."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, float | None] = {}

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        if kind == "diagnosis":
            self.found = values
        return super().write(kind, step, **values)


def random_model(seed: int = 0) -> GPT:
    """Return a model of two layers of which no weight is zero, so that every fault reaches its outputs."""
    model = GPT(GPTConfig.from_depth(2, vocab_size=VOCABULARY, sequence_len=LENGTH))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                parameter.normal_(0, 0.05, generator=generator)
    return model


def _ids(rows: int = 2, length: int = 32) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


# --- the faults: each is a patch, and the measurement of a property that it breaks ---


def _leaky_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None) -> Tensor:
    seen = torch.ones(q.size(1), k.size(1), dtype=torch.bool).tril(1)  # the fault: tril(1) shows the next token
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def inject_mask() -> Patch:
    """Return the patch by which a query sees one key too many."""
    return mock.patch.object(ops, "attention", _leaky_attention)


@torch.no_grad()
def measure_mask() -> float:
    """Return the largest change of a logit before position t if token t changes."""
    model, ids = random_model(), _ids()
    changed = ids.clone()
    changed[:, 20] = (ids[:, 20] + 1) % VOCABULARY
    return float((model(ids) - model(changed))[:, :20].abs().max())


def inject_targets() -> Patch:
    """Return the patch by which the target of a position is its own token."""

    def pair(self: TokenStream, start: int, sequence_len: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = self.read(start, start + sequence_len)
        return tokens, tokens  # the fault: the targets are not shifted

    return mock.patch.object(TokenStream, "pair", pair)


def measure_targets() -> float:
    """Return the share of positions whose target is the next input."""
    loader = BatchLoader(_corpus().train, batch_rows=ROWS, sequence_len=LENGTH, seed=0)
    inputs, targets = loader.batch(0)
    return float((targets[:, :-1] == inputs[:, 1:]).double().mean())


def inject_rope() -> Patch:
    """Return the patch by which keys turn in the other direction than queries."""

    real = Attention.project

    def project(
        self: Attention, x: Tensor, cos: Tensor, sin: Tensor, values: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        turned, _, v = real(self, x, cos, sin, values)
        _, turned_back, _ = real(self, x, cos, -sin, values)  # the fault: -sin
        return turned, turned_back, v

    return mock.patch.object(Attention, "project", project)


@torch.no_grad()
def measure_rope() -> float:
    """Return the largest difference of two scores of equal vectors at equal distances."""
    model, length = random_model(), 32
    x = torch.randn(1, 1, model.config.n_embd, generator=torch.Generator().manual_seed(2)).expand(1, length, -1)
    q, k, _ = model.blocks[0].attn.project(x, model.cos[:, :length], model.sin[:, :length])
    scores = q[0, :, 0] @ k[0, :, 0].T / model.config.head_dim**0.5
    return float((scores[1:, 1:] - scores[:-1, :-1]).abs().max())


def inject_scale() -> Patch:
    """Return the patch by which scores are not divided by sqrt(D)."""
    return mock.patch.object(ops, "attention", functools.partial(ops.attention, scale=1.0))


@torch.no_grad()
def measure_scale() -> float:
    """Return the largest difference between the attention of the model and torch's."""
    model, length = random_model(), 32
    attention = model.blocks[0].attn
    x = torch.randn(1, length, model.config.n_embd, generator=torch.Generator().manual_seed(2))
    cos, sin = model.cos[:, :length], model.sin[:, :length]
    q, k, v = (part.transpose(1, 2) for part in attention.project(x, cos, sin))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return float((attention(x, cos, sin) - attention.c_proj(expected.flatten(-2))).abs().max())


def inject_qk_norm() -> Patch:
    """Return the patch by which queries and keys are rotated and not normalized."""

    def rotate_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        return x * cos + torch.cat((x2 * sin, x1 * -sin), dim=-1)  # the fault: no norm

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return scale * rotate_one(q, cos, sin), scale * rotate_one(k, cos, sin)

    return mock.patch.object(gpt, "rotary_norm", rotate)


@torch.no_grad()
def measure_qk_norm() -> float:
    """Return the largest score, as a multiple of sqrt(D), if the weights of the queries are 10 times as large."""
    model, length = random_model(), 32
    attention = model.blocks[0].attn
    attention.c_q.weight.mul_(10)
    x = torch.randn(1, length, model.config.n_embd, generator=torch.Generator().manual_seed(2))
    return largest_logit(attention, x, model.cos[:, :length], model.sin[:, :length]) / attention.head_dim**0.5


def inject_softcap() -> Patch:
    """Return the patch by which the loss is that of logits without the softcap."""

    def uncapped(*args: Tensor, softcap: float, **options: Any) -> Tensor:
        return original(*args, softcap=None, **options)  # the fault: softcap is not passed on

    original = ops.linear_cross_entropy
    return mock.patch.object(ops, "linear_cross_entropy", uncapped)


@torch.no_grad()
def measure_softcap() -> float:
    """Return the difference between the loss and the cross-entropy of the logits, for logits above the cap."""
    model, ids = random_model(), _ids()
    model.lm_head.weight.mul_(50)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    return float((model(inputs, targets) - expected).abs())


def inject_rate() -> Patch:
    """Return the patch by which every learning rate is 100 times as large."""

    def set_rates(self: Trainer, multiplier: float, momentum: float, decay: float = 1.0) -> None:
        original(self, 100 * multiplier, momentum, decay)  # the fault: 100

    original = Trainer.set_rates
    return mock.patch.object(Trainer, "set_rates", set_rates)


def measure_rate() -> float:
    """Return the loss after twelve steps on one batch, in nats."""
    trainer = _trainer()
    batch = trainer.loader.batch(0)
    for _ in range(OVERFIT_STEPS):
        trainer.train_step(iter([batch]))
    return float(trainer.model(*batch).detach())


def inject_accumulation() -> Patch:
    """Return the patch by which the gradients of the micro-batches are added and not averaged."""

    def compute_gradients(self: Trainer, batch: Batch) -> tuple[float, float]:
        with mock.patch.object(Pretraining, "loss_divisors", lambda self, parts, world: [1] * len(parts)):  # the fault
            loss, norm = original(self, batch)
        return loss / self.accumulation_steps, norm  # as in most loops, the printed loss is right

    original = Trainer.compute_gradients
    return mock.patch.object(Trainer, "compute_gradients", compute_gradients)


def measure_accumulation() -> float:
    """Return the norm of the gradient in four micro-batches, as a multiple of that in one."""
    norms = []
    for rows in (ROWS // 4, ROWS):
        trainer = _trainer(device_batch_size=rows)
        norms.append(trainer.compute_gradients(trainer.loader.batch(0))[1])
    return norms[0] / norms[1]


def _clip_per_rank(self: Trainer, batch: Batch) -> tuple[float, float]:
    """Compute the gradients of a step on two simulated ranks, each with half of the batch."""
    parameters = list(self.model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    losses, norms = [], []
    for inputs, targets in zip(*(part.chunk(2) for part in batch), strict=True):
        loss = self.model(inputs, targets)
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(clip_grad_norm_(parameters, self.config.grad_clip)))  # the fault: before the average
        for mean, parameter in zip(total, parameters, strict=True):
            assert parameter.grad is not None
            mean += parameter.grad / 2
        self.zero_grad()
    for mean, parameter in zip(total, parameters, strict=True):
        parameter.grad = mean
    return statistics.mean(losses), max(norms)


def inject_clip() -> Patch:
    """Return the patch by which each of two ranks clips its own gradient before they are averaged."""
    return mock.patch.object(Trainer, "compute_gradients", _clip_per_rank)


def measure_clip() -> float:
    """Return the cosine of the clipped gradient and the mean gradient, if one half of the batch is noise."""
    gradients = []
    for clip in (0.01, 1e9):
        trainer = _trainer(grad_clip=clip)
        inputs, targets = (part.clone() for part in trainer.loader.batch(0))
        inputs[: ROWS // 2] = targets[: ROWS // 2] = 7  # a broken half: one token, again and again
        trainer.compute_gradients((inputs, targets))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    return float(F.cosine_similarity(gradients[0].double(), gradients[1].double(), dim=0))


@contextlib.contextmanager
def inject_decay() -> Iterator[None]:
    """Multiply the weights by 1 - weight_decay in each step, without the learning rate."""

    def undone(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, lr: float, weight_decay: float, **options: Any) -> None:
            function(*args, lr=lr, weight_decay=weight_decay / lr if lr else 0.0, **options)  # the fault: / lr

        return call

    with (
        mock.patch.object(ops, "adamw_", undone(ops.adamw_)),
        mock.patch.object(ops, "newton_schulz_update_", undone(ops.newton_schulz_update_)),
    ):
        yield


@torch.no_grad()
def measure_decay() -> float:
    """Return the relative decrease of lm_head in a step without gradient, as a multiple of rate x decay."""
    model = random_model()
    (adamw,) = (each for each in setup_optimizers(model, weight_decay=DECAY) if isinstance(each, AdamW))
    weight = model.lm_head.weight
    weight.grad, before = torch.zeros_like(weight), weight.double().norm()
    adamw.step()
    rate = next(group["lr"] for group in adamw.param_groups if "lm_head.weight" in group["param_names"])
    return float(1 - weight.double().norm() / before) / (rate * DECAY)


@contextlib.contextmanager
def inject_tokenizer() -> Iterator[None]:
    """Let the tokenizer of a run be another run's, and read the text with it from step INTRUSION on."""

    def compute_gradients(self: Trainer, batch: Batch) -> tuple[float, float]:
        return original(self, batch if self.step < INTRUSION else others.batch(self.step))

    original = Trainer.compute_gradients
    others = BatchLoader(_corpus(other=True).train, batch_rows=ROWS, sequence_len=LENGTH, seed=0)
    with (
        mock.patch.object(Tokenizer, "load", return_value=other_tokenizer()),  # the fault: another run's folder
        mock.patch.object(Trainer, "compute_gradients", compute_gradients),
    ):
        yield


def measure_tokenizer() -> float:
    """Return 1 if a model and the tokenizer in its folder are loaded, and 0 if they are refused."""
    model, tokenizer = random_model(), own_tokenizer()
    meta = {"model_config": vars(model.config), "tokenizer_hash": tokenizer.hash}
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "tokenizer")
        checkpoint.save(Path(folder) / "checkpoints", 1, {"model": weights}, meta, keep=1)
        try:
            load_model(folder)
        except ValueError:
            return 0.0
    return 1.0


@contextlib.contextmanager
def _nan_gradient() -> Iterator[None]:
    """Put one NaN into the gradient of step INTRUSION."""
    calls = iter(range(1 << 30))

    def clip(optimizers: Any, max_norm: float, **options: Any) -> Tensor:
        if next(calls) == INTRUSION:
            optimizers[-1].param_groups[0]["params"][0].grad[0, 0] = math.nan  # of a matrix that Muon trains
        return original(optimizers, max_norm, **options)

    original = trainer_module.clip_reduced_
    with mock.patch.object(trainer_module, "clip_reduced_", clip):
        yield


@contextlib.contextmanager
def inject_nan() -> Iterator[None]:
    """Remove the guard of the trainer: a gradient that is not finite is used like any other."""
    blind = types.SimpleNamespace(isfinite=lambda value: True, inf=math.inf, nan=math.nan, log=math.log)
    with mock.patch.object(trainer_module, "math", blind):  # the fault: nobody asks whether the norm is finite
        yield


def measure_nan() -> float:
    """Return the share of weights that are no longer finite after a step with one NaN in its gradient."""
    trainer = _trainer()
    with mock.patch(f"{__name__}.INTRUSION", 0), _nan_gradient():
        trainer.train_step(iter([trainer.loader.batch(0)]))
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return float((~weights.isfinite()).double().mean())


@dataclass(frozen=True)
class Fault:
    """A fault, and the check that finds it.

    Attributes:
        title: what is wrong.
        inject: returns the patch, a context in which the program has the fault.
        check: the property that must hold, as a phrase.
        measure: returns a number for the property.
        holds: whether the number means that the property holds.
        around: a context in which the run is made, with the fault or without it.
        flags: flags of the run, with the fault or without it.
    """

    title: str
    inject: Callable[[], Patch]
    check: str
    measure: Callable[[], float]
    holds: Callable[[float], bool]
    around: Callable[[], Patch] = contextlib.nullcontext
    flags: Mapping[str, Any] = field(default_factory=dict)


def _below(bound: float) -> Callable[[float], bool]:
    return lambda value: value < bound


def _one(value: float) -> bool:
    return abs(value - 1) < 1e-3


FAULTS = {
    "mask": Fault(
        "mask off by one",
        inject_mask,
        "change token t: no output before t changes",
        measure_mask,
        lambda value: value == 0,
    ),
    "targets": Fault(
        "targets not shifted",
        inject_targets,
        "the target of a position is the next input",
        measure_targets,
        _one,
    ),
    "rope": Fault(
        "RoPE turns the keys backward",
        inject_rope,
        "equal vectors at equal distances have equal scores",
        measure_rope,
        _below(1e-4),
    ),
    "scale": Fault(
        "no 1/sqrt(D) in attention",
        inject_scale,
        "attention equals that of torch",
        measure_scale,
        _below(1e-4),
    ),
    "qk_norm": Fault(
        "no QK-norm",
        inject_qk_norm,
        "queries times 10: no score above sqrt(D)",
        measure_qk_norm,
        _below(1 + 1e-5),
    ),
    "softcap": Fault(
        "no softcap in the loss",
        inject_softcap,
        "the loss is the cross-entropy of the logits",
        measure_softcap,
        _below(1e-4),
    ),
    "rate": Fault(
        "learning rates times 100",
        inject_rate,
        "overfit one batch: below 2 nats after twelve steps",
        measure_rate,
        _below(2),
    ),
    "accumulation": Fault(
        "accumulation not divided",
        inject_accumulation,
        "any cut into micro-batches has the same gradient",
        measure_accumulation,
        _one,
    ),
    "clip": Fault(
        "each rank clips its own gradient",
        inject_clip,
        "clipping keeps the direction of the mean gradient",
        measure_clip,
        _one,
    ),
    "decay": Fault(
        "weight decay without the rate",
        inject_decay,
        "no gradient: a step multiplies weights by 1 - rate x decay",
        measure_decay,
        _one,
        flags={"weight_decay": DECAY, "matrix_weight_decay": DECAY},
    ),
    "tokenizer": Fault(
        "tokenizer of another run",
        inject_tokenizer,
        "the tokenizer has the hash of the checkpoint",
        measure_tokenizer,
        lambda value: value == 1,
    ),
    "nan": Fault(
        "NaN in a gradient, no guard",
        inject_nan,
        "a step with a NaN in its gradient changes no weight",
        measure_nan,
        lambda value: value == 0,
        _nan_gradient,
    ),
}


# --- runs ---


def train(around: Callable[[], Patch] = contextlib.nullcontext, *, seed: int = 0, **flags: Any) -> dict[str, Any]:
    """Return the curve of a run of STEPS steps, its validation loss and its last --diagnose, made inside `around`.

    seed: of the first weights. The batches are always the same.
    """
    with around():
        trainer = _trainer(**flags)
        trainer.model.init_weights(seed)
        losses = []
        with trainer.loader.iterate(0) as batches:
            while trainer.step < STEPS:
                trainer.train_step(batches)
                losses.append(trainer.last_loss)
        validation = trainer.measure(trainer.validation_batches(4096)).loss
    assert isinstance(trainer.log, Diagnoses)
    kept = ("attention_logit", "gradient_norm", "update_to_weight", "orthogonality_error", "dead_units")
    return {
        "losses": [_rounded(loss) for loss in losses],
        "final": _rounded(statistics.mean(losses[-LAST:])),
        "validation": _rounded(validation),
        "skipped": trainer.skipped,
        "diagnosis": {name: _largest(trainer.log.found, name) for name in kept},
    }


def _largest(found: dict[str, float | None], quantity: str) -> float | None:
    """Return the largest value of a quantity of --diagnose over the layers; None if one is not finite."""
    values = [value for name, value in found.items() if name.startswith(f"{quantity}/")]
    known = [value for value in values if value is not None]
    return _rounded(max(known)) if len(known) == len(values) else None


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def run_fault(name: str) -> dict[str, Any]:
    """Return the run with a fault."""
    fault = FAULTS[name]

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with fault.around(), fault.inject():
            yield

    return train(around, **fault.flags)


def check_fault(name: str) -> dict[str, Any]:
    """Return the number of a check on the healthy program and on the faulty one, and whether each passes."""
    fault = FAULTS[name]
    healthy = fault.measure()
    with fault.inject():
        faulty = fault.measure()
    return {
        "check": fault.check,
        "healthy": _rounded(healthy),
        "faulty": _rounded(faulty),
        "healthy_passes": fault.holds(healthy),
        "faulty_passes": fault.holds(faulty),
    }


def healthy_runs() -> dict[str, Any]:
    """Return the healthy run of the first seed, with the final losses of all seeds and their standard deviation."""
    runs = [train(seed=seed) for seed in range(SEEDS)]
    finals = [run["final"] for run in runs]
    return runs[0] | {"finals": finals, "spread": _rounded(statistics.stdev(finals))}


def report(name: str, healthy: dict[str, Any]) -> dict[str, Any]:
    """Return the run with a fault beside the healthy one, and the check that finds it."""
    fault = FAULTS[name]
    run = run_fault(name)
    if fault.around is not contextlib.nullcontext or fault.flags:
        beside = train(fault.around, **fault.flags)
    else:
        beside = healthy
    differs = math.inf if run["final"] is None else run["final"] - beside["final"]
    found = {
        "fault": fault.title,
        "final": run["final"],
        "healthy_final": beside["final"],
        "seen_in_the_curve": "yes" if abs(differs) > SEEN * healthy["spread"] else "no",
    }
    return found | check_fault(name) | {"run": run, "healthy_skipped": beside["skipped"]}


def faults() -> dict[str, Any]:
    """Train a small model without a fault and with each of a dozen faults, and run the check that finds each (1 min).

    A curve is seen to be wrong if its mean loss over the last ten steps is further from that of the healthy run than
    three standard deviations of healthy runs from other weights, or is not finite. All runs read the same batches.
    """
    healthy = healthy_runs()
    found = {name: report(name, healthy) for name in FAULTS}
    unseen = sum(each["seen_in_the_curve"] == "no" for each in found.values())
    return {
        "steps": STEPS,
        "vocabulary": VOCABULARY,
        "healthy": healthy,
        "faults": found,
        "number": len(found),
        "unseen": unseen,
        "found_by_check": sum(each["healthy_passes"] and not each["faulty_passes"] for each in found.values()),
    }


DEMONSTRATIONS = {"faults": faults}
