"""The inputs, and the errors, on which torch tests its own optimizers, on ours.

Every one of them is in a table below: it gives the numbers of torch's optimizer, or an error, or it is left out with
the reason. An input that a newer torch adds fails `test_every_input_of_torch_is_in_a_table` by its name.
"""

import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

from nanochat_native.optim import AdamW, Muon

pytest.importorskip("expecttest")  # torch's test utilities import it

KINDS = {"AdamW": AdamW, "Muon": Muon}
THEIRS = {"AdamW": torch.optim.AdamW, "Muon": torch.optim.Muon}

# torch's module changes settings of the process that imports it. What it gives is tensors, numbers and names.
COLLECT = """
import pickle, sys, torch
from torch.testing._internal.common_optimizers import optim_db
found = {}
for info in optim_db:
    if info.name in ("AdamW", "Muon"):
        inputs = {input.desc: input.kwargs for device in ("cpu", "cuda") for input in info.optim_inputs_func(device)}
        errors = {}
        for each in info.optim_error_inputs_func("cpu", torch.float32):
            input = each.optimizer_error_input
            errors.setdefault(input.desc, []).append((input.params, input.kwargs, each.error_type, each.error_regex))
        found[info.name] = inputs, errors
pickle.dump(found, sys.stdout.buffer)
"""


@pytest.fixture(scope="module")
def of_torch():
    """name -> ({description: settings}, {description: [(parameters, settings, error, pattern)]})."""
    collected = subprocess.run([sys.executable, "-c", COLLECT], capture_output=True, check=False, timeout=300)
    assert collected.returncode == 0, collected.stderr.decode()
    return pickle.loads(collected.stdout)


# Where torch's setting is given as it is, and where under another name.
SAME = {
    ("AdamW", "default"): {},
    ("AdamW", "non-default lr"): {},
    ("AdamW", "nonzero weight_decay"): {},
    ("AdamW", "Tensor lr"): {},
    ("Muon", "default"): {},
    ("Muon", "non-default lr"): {},
    ("Muon", "Tensor lr"): {},
    ("Muon", "non-default weight_decay"): {},
    ("Muon", "non-default momentum"): {},
    ("Muon", "passing alternative ns_steps"): {},
    ("Muon", "passing alternative ns_coefficients"): {"ns_coefficients": "coefficients"},
}
# Settings that ours do not have: a TypeError that names the one.
REFUSED = {
    ("AdamW", "maximize"): "maximize",
    ("AdamW", "amsgrad"): "amsgrad",
    ("AdamW", "capturable"): "capturable",
    ("AdamW", "capturable, amsgrad"): "amsgrad",
    ("AdamW", "Tensor lr with capturable and amsgrad"): "amsgrad",
    ("AdamW", "Tensor lr, Tensor betas, with capturable and amsgrad"): "amsgrad",
    ("AdamW", "Tensor lr, Tensor betas, with capturable"): "amsgrad",
    ("Muon", "match_rms_adamw lr adjustment"): "adjust_lr_fn",
    ("Muon", "spectral_unclamped lr adjustment"): "adjust_lr_fn",
}
# Errors: None for torch's own type and words, or ours, or why there is none.
OF_BOTH = {
    "invalid param type": None,
    "a param group cannot have duplicate parameters": None,
    "warn on a bare unordered set of params": None,
    "duplicate parameters should not occur across param groups either": None,
    "all optimizer params should be with/without names": None,
    "all optimizer param groups should be with/without names.": None,
    "Tensor lr must be 1-element": (
        ValueError,
        r"lr must be a number >= 0 or a tensor of one element, got a tensor of shape \(2,\)",
    ),
}
ERRORS = {(name, description): error for name in KINDS for description, error in OF_BOTH.items()} | {
    ("AdamW", "beta1 should be between 0 and 1"): (
        ValueError,
        r"betas\[0\] must be a number >= 0 and < 1, got 1.0",
    ),
    ("AdamW", "weight_decay should > 0"): (ValueError, "weight_decay must be a number >= 0, got -1.0"),
    ("AdamW", "lr as Tensor doesn't work with foreach & not capturable"): "ours takes both",
    ("AdamW", r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True"): "ours takes both",
    ("AdamW", "betas must be either both floats or both Tensors"): "ours takes either, each for its number",
    ("Muon", "only support 2D parameters"): "ours takes stacks of matrices, (2, 3, 4) among them",
    ("Muon", "only support `original` and `match_rms_adamw`"): (TypeError, "adjust_lr_fn"),
    ("Muon", "unsupported adjust_lr_fn"): (TypeError, "adjust_lr_fn"),
    ("Muon", "does not support complex parameters"): (
        TypeError,
        "must be torch.float32 or torch.bfloat16 for Muon, got torch.complex64",
    ),
}


def test_every_input_of_torch_is_in_a_table(of_torch):
    unknown = []
    for name, (inputs, errors) in of_torch.items():
        unknown += [f"{name}: {d}" for d in inputs if (name, d) not in SAME and (name, d) not in REFUSED]
        unknown += [f"{name}, an error: {d}" for d in errors if (name, d) not in ERRORS]
    assert not unknown, f"torch {torch.__version__} has inputs that no table names: {'; '.join(unknown)}"
    assert set(of_torch) == set(KINDS)


class TorchInFloat32:
    """The module torch, but with float32 for bfloat16."""

    bfloat16 = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


def parameters(name):
    shapes = [(4, 6), (6, 4), (4, 6), (5, 5)]
    if name == "AdamW":
        shapes += [(7,), (), (2, 3, 2, 2)]
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def steps(optimizer, tensors):
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        for parameter in tensors:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in tensors]


@pytest.mark.parametrize(("name", "description"), SAME)
def test_the_numbers_are_torchs(of_torch, name, description, monkeypatch):
    inputs, _ = of_torch[name]
    if description == "Tensor lr" and name == "AdamW":  # torch has it for Apple's GPUs only
        inputs = {**inputs, description: {"lr": torch.tensor(0.01)}}
    if description not in inputs:
        pytest.skip(f"torch {torch.__version__} has no input {description!r}")
    settings = inputs[description]
    theirs, ours = parameters(name), parameters(name)
    # In float32, as ours, its own products are bfloat16's. Newer versions convert by Tensor.to.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    monkeypatch.setattr("torch.optim._muon.torch", TorchInFloat32())
    reference = THEIRS[name](theirs, **settings)
    group = reference.param_groups[0]
    own = {key: group[key] for key in ("lr", "weight_decay")}  # the defaults differ
    for key, value in settings.items():
        renamed = SAME[name, description].get(key, key)
        own[renamed] = [value] if renamed == "coefficients" else value
    before = [p.detach().clone() for p in ours]
    expected, found = steps(reference, theirs), steps(KINDS[name](ours, **own), ours)
    for old, a, b in zip(before, expected, found, strict=True):
        assert not torch.equal(old, a)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "description"), REFUSED)
def test_unsupported_settings_are_named(of_torch, name, description):
    inputs, _ = of_torch[name]
    if description not in inputs:
        pytest.skip(f"torch {torch.__version__} has no input {description!r}")
    with pytest.raises(TypeError, match=REFUSED[name, description]):
        KINDS[name](parameters(name), **inputs[description])


@pytest.mark.parametrize(("name", "description"), ERRORS)
@pytest.mark.filterwarnings("error::UserWarning", "error::FutureWarning")  # torch's test takes them for errors, too
def test_errors(of_torch, name, description):
    """At construction, even where torch's come in the step."""
    _, errors = of_torch[name]
    if description not in errors:
        pytest.skip(f"torch {torch.__version__} has no such error of {name}")
    expected = ERRORS[name, description]
    for given, settings, *of_torchs in errors[description]:
        tensors = parameters(name) if given is None else given
        if isinstance(expected, str):
            steps(KINDS[name](tensors, **settings), tensors)
            continue
        kind, message = expected or of_torchs
        with pytest.raises(kind) as raised:
            KINDS[name](tensors, **settings)
        assert re.search(message, str(raised.value))
