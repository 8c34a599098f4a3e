"""The projections of a layer with value embeddings, against plain torch, and what their backward pass does not do."""

import pytest
import torch
from backends import BACKENDS, use
from torch import Tensor

from nanochat_native import ops
from nanochat_native.model import functional
from nanochat_native.ops import weight_copies

B, T, C, V, HKV, D = 2, 40, 48, 11, 2, 8


def formula(x, c_q, c_k, c_v, gate, table, ids):
    gates = 3 * torch.sigmoid(x[..., :12] @ gate.mT)
    v = x @ c_v.mT + (gates[..., None] * table[ids].unflatten(-1, (HKV, D))).flatten(-2)
    return x @ c_q.mT, x @ c_k.mT, v


def problem(dtype=torch.float32, table_dtype=torch.float32):
    """Return x and the weights as leaves, the ids, and the gradients of q, k and v."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [
        random(B, T, C).to(dtype),
        *((random(outputs, C) * C**-0.5).to(wide) for outputs in (32, HKV * D, HKV * D)),
        (random(HKV, 12) / 4).to(wide),
        random(V, HKV * D).to(table_dtype),
    ]
    ids = torch.randint(0, V, (B, T), generator=generator)
    douts = [random(B, T, outputs).to(dtype) for outputs in (32, HKV * D, HKV * D)]
    return [tensor.requires_grad_() for tensor in inputs], ids, douts


def project(x, c_q, c_k, c_v, gate, table, ids):
    return functional.project(x, [c_q, c_k, c_v], gate, table, ids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "table_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.bfloat16, torch.bfloat16, 2e-2),
    ],
    ids=str,
)
def test_projections_and_their_gradients_are_those_of_plain_torch(dtype, table_dtype, tolerance, backend):
    use(backend)
    inputs, ids, douts = problem(dtype, table_dtype)
    ours = project(*inputs, ids)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = formula(*wide, ids)
    grads = torch.autograd.grad(ours, inputs, douts)
    exact_grads = torch.autograd.grad(exact, wide, [d.double() for d in douts])
    assert [x.dtype for x in (*ours, *grads)] == [dtype] * 3 + [x.dtype for x in inputs]
    for mine, other in zip((*ours, *grads), (*exact, *exact_grads), strict=True):
        assert (mine.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.filterwarnings("ignore:nanochat_native. .* is served by plain torch")
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_and_transforms_of_the_projections(backend):
    use(backend)
    inputs, ids, _ = problem(torch.float64, torch.float64)
    inputs = [x.detach()[:, :3].clone().requires_grad_() if x.dim() == 3 else x for x in inputs]
    ids = ids[:, :3]

    def loss(function, *tensors):
        return sum(out.sin().sum() for out in function(*tensors, ids))

    def second(function):
        first = torch.autograd.grad(loss(function, *inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum(grad.cos().sum() for grad in first), inputs)

    ours = second(project)
    of_func = torch.func.grad(lambda *xs: loss(project, *xs), tuple(range(6)))(*(x.detach() for x in inputs))
    for mine, other in zip(ours, second(formula), strict=True):
        torch.testing.assert_close(mine, other)
    for mine, other in zip(of_func, torch.autograd.grad(loss(formula, *inputs), inputs), strict=True):
        torch.testing.assert_close(mine, other)


def test_only_the_gradients_that_are_needed_are_returned():
    inputs, ids, douts = problem()
    for needed in range(6):
        tensors = [x.detach().requires_grad_(i == needed) for i, x in enumerate(inputs)]
        (grad,) = torch.autograd.grad(project(*tensors, ids), tensors[needed], douts)
        expected = torch.autograd.grad(formula(*inputs, ids), inputs[needed], douts)[0]
        torch.testing.assert_close(grad, expected)


def test_the_backward_pass_allocates_no_other_gradient_of_x(monkeypatch):
    """The gradient of x from the gate has the gate's channels alone, and is added in place."""
    shapes = []
    backward = ops.add_value_embedding_backward

    def watched(*args):
        results = backward(*args)
        shapes.extend(tuple(x.shape) for x in results)
        return results

    monkeypatch.setattr(ops, "add_value_embedding_backward", watched)
    last_product: list[Tensor] = []
    product = ops.linear_backward

    def watched_product(*args, **options):
        results = product(*args, **options)
        last_product[:] = [results[0]]
        return results

    monkeypatch.setattr(ops, "linear_backward", watched_product)
    inputs, ids, douts = problem()
    dx, *_ = torch.autograd.grad(project(*inputs, ids), inputs, douts)
    assert shapes == [(B, T, 12), (HKV, 12), (V, HKV * D)]
    assert dx.data_ptr() == last_product[0].data_ptr()


def test_the_gate_and_the_table_need_no_copies():
    """They are read as they are, so no pass over a table casts it."""
    inputs, ids, douts = problem(torch.bfloat16)
    kept = inputs[1:]
    weight_copies.keep(kept)
    torch.autograd.grad(project(*inputs, ids), inputs, douts)
    assert [weight_copies.copy_for_update(weight) is not None for weight in kept] == [True, True, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_smear_takes_parameters_of_another_type(backend):
    use(backend)
    e, gate, scale = torch.randn(2, 5, 30).bfloat16(), torch.randn(1, 24).bfloat16(), torch.tensor([0.5]).bfloat16()
    expected = functional.smear(e.double(), gate.double(), scale.double())
    torch.testing.assert_close(functional.smear(e, gate, scale).double(), expected, rtol=2**-7, atol=2**-7)
