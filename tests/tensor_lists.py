"""Lists of tensors for the tests of the optimizers' operators."""

import torch

SHAPES = [(1,), (7,), (3, 5), (16, 16), (1001,), (2, 3, 4), (0,), (70_001,)]


def state(shapes=SHAPES, dtype=torch.float32, moments=torch.float32):
    """Return params, grads, exp_avgs, exp_avg_sqs."""
    params, grads, firsts = ([torch.randn(shape).to(kind) for shape in shapes] for kind in (dtype, dtype, moments))
    return params, grads, firsts, [torch.rand(shape).to(moments) for shape in shapes]


def clone(lists):
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def unaligned(tensors):
    """Return the same values one element behind an aligned address."""
    result = []
    for tensor in tensors:
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        room[1:] = tensor.reshape(-1)
        result.append(room[1:].view(tensor.shape))
    return result


def number(value):
    """Return the number in a 0-d tensor, as the operators take it."""
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def assert_lists_equal(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, mine, other))
