"""Rows of several documents: the model reads each as if it were alone, forward and backward, on every backend."""

import pytest
import torch
from backends import BACKENDS, use
from torch.nn.functional import pad

from nanochat_native.model.config import ARCHITECTURES, GPTConfig
from nanochat_native.model.documents import LEAST_STEP, Documents, padded_length
from nanochat_native.model.gpt import GPT

BOS = 69
SIZES = {"sequence_len": 300, "vocab_size": 70, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
CONFIGS = {
    "october": GPTConfig(**SIZES, window_pattern="L", **ARCHITECTURES["october"]),
    "today": GPTConfig(**SIZES, window_pattern="SSSL", **ARCHITECTURES["today"]),
}
# The lengths of the documents of each row; the last place of the second row is padding. 200 is beyond the window S.
ROWS = ((200, 7, 93), (40, 1, 2, 16, 17, 223), (300,))


def model_of(name, **options):
    """Return a model in float64 in which every part has an effect."""
    model = GPT(CONFIGS[name], **options)
    model.init_weights(seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.double()


def documents():
    generator = torch.Generator().manual_seed(5)
    return [
        [torch.cat((torch.tensor([BOS]), torch.randint(68, (n,), generator=generator))) for n in row] for row in ROWS
    ]


def packed():
    """Return (inputs, targets) of all rows. A document of n + 1 tokens takes n places."""
    inputs = [
        pad(torch.cat([tokens[:-1] for tokens in row]), (0, 300 - sum(map(len, row)) + len(row))) for row in documents()
    ]
    targets = [torch.cat([tokens[1:] for tokens in row]) for row in documents()]
    return torch.stack(inputs), torch.stack([pad(row, (0, 300 - len(row)), value=-1) for row in targets])


@torch.no_grad()
def nats(model, inputs, targets, split=None):
    return model(inputs, targets, reduction="none", documents=split)


def alone(model):
    """Return the nats of each target, from documents that are each alone in a batch."""
    return torch.cat([nats(model, t[None, :-1], t[None, 1:])[0] for row in documents() for t in row])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_each_document_has_the_loss_and_the_gradients_that_it_has_alone(backend, name):
    use(backend)
    model = model_of(name)
    inputs, targets = packed()
    found = nats(model, inputs, targets, Documents(inputs, BOS))
    torch.testing.assert_close(found[targets >= 0], alone(model), atol=1e-10, rtol=1e-10)
    assert found[targets < 0].abs().max() == 0
    crossing = nats(model, inputs, targets)
    assert (crossing - found).abs().max() > 1e-2, "attention across documents would show"

    model(inputs, targets, reduction="sum", documents=Documents(inputs, BOS)).backward()
    gradients = {parameter_name: p.grad.clone() for parameter_name, p in model.named_parameters()}
    model.zero_grad()
    for row in documents():
        for tokens in row:
            model(tokens[None, :-1], tokens[None, 1:], reduction="sum").backward()
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[parameter_name], parameter.grad, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("part", ["positions", "is_first", "attention"])
def test_the_comparison_finds_each_part_that_is_missing(part, monkeypatch):
    """Rotary positions that run on keep the loss but for rounding, because they are relative: they change bits."""
    model = model_of("today")
    inputs, targets = packed()
    split = Documents(inputs, BOS)
    right = nats(model, inputs, targets, split)
    if part == "positions":
        split.positions = torch.arange(300).repeat(3)
    elif part == "is_first":
        split.is_first = torch.zeros_like(split.is_first)
    else:
        rows = lambda x: x.view(3, 300, *x.shape[2:])  # noqa: E731
        whole = lambda q, k, v, window: torch.ops.nanochat_native.attention_forward(  # noqa: E731
            rows(q), rows(k), rows(v), True, -1 if window is None else window, q.size(-1) ** -0.5, None
        )[0].view(q.shape)
        monkeypatch.setattr(split, "attention", whole)
    wrong = nats(model, inputs, targets, split)
    difference = (wrong - right).abs().max()
    assert difference > (1e-9 if part == "positions" else 1e-3)


def test_bits_are_the_same_each_time_and_with_recomputed_activations():
    inputs, targets = packed()
    found = []
    for recompute in (False, False, True):
        model = model_of("today", grad_checkpoint=recompute)
        model(inputs, targets, documents=Documents(inputs, BOS)).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, *others in zip(*found, strict=True) for other in others)


def test_lengths_are_padded_by_at_most_a_quarter():
    for length in range(1, 5000):
        padded = padded_length(length)
        assert length <= padded <= length + max(LEAST_STEP - 1, length / 4)
        assert padded_length(padded) == padded
    assert len({padded_length(length) for length in range(1, 2049)}) < 40


def test_a_row_begins_a_document_also_without_its_token_and_others_are_refused():
    split = Documents(torch.tensor([[1, 2, BOS, 3], [4, 5, 6, 7]]), BOS)
    assert split.positions.tolist() == [0, 1, 0, 1, 0, 1, 2, 3]
    assert split.groups == [(3, LEAST_STEP)]
    with pytest.raises(ValueError, match="documents must be those of idx, got 8 tokens"):
        model_of("october")(torch.tensor([[1, 2]]), documents=split)
