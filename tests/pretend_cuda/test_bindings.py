"""The bindings of python/ops_cuda.cpp, with emulated kernels: what each operator returns, and defects."""

import re
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat_native import ops
from pretend_cuda import binding_cases, call_on_pretend_cuda, on_pretend_cuda, unavailable
from pretend_cuda.binding_cases import CASES
from pretend_cuda.mutations import MUTATIONS, OPERATORS, bindings, library

WITH_A_CHOICE_OF_KERNELS = [name for name in CASES if name.startswith(("attention", "decoding", "newton_schulz"))]


@pytest.mark.parametrize("name", CASES)
@on_pretend_cuda(devices=2)
def test_operator_equals_its_reference(name):
    CASES[name]()


@pytest.mark.parametrize("name", WITH_A_CHOICE_OF_KERNELS)
@on_pretend_cuda(devices=2, capability=(8, 0))
def test_operator_equals_its_reference_on_an_older_gpu(name):
    CASES[name]()


def call_the_older_kernels():
    assert ops.cuda_instruction_set() == "sm_80"
    for D in (64, 96, 128):  # each has tiles of its own
        binding_cases.attention_of_awkward_strides(D=D)
    binding_cases.decoding()
    binding_cases.newton_schulz_update()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0)], ids=str)
def test_gpus_without_hoppers_instructions_run_the_older_kernels(capability):
    """Their blocks get 163, 99, 99, 227 and 99 KB of shared memory."""
    call_on_pretend_cuda(call_the_older_kernels, devices=2, capability=capability)


class CalledOperators(TorchDispatchMode):
    """Collects the names of the package's operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "nanochat_native":
            self.names.add(function.name().partition("::")[2])
        return function(*args, **kwargs or {})


@pytest.fixture(scope="module")
def called():
    """Return the names of the operators that each case calls on the CPU; none where it calls a reference."""

    def run_on_cpu(run, *tensors, exact=None, **options):
        run(*(tensor.to(exact) if exact and tensor.is_floating_point() else tensor for tensor in tensors))

    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binding_cases, "compare", run_on_cpu)
        for name, case in CASES.items():
            with CalledOperators() as mode:
                case()
            names[name] = mode.names
    return names


def test_a_case_calls_each_operator(called):
    registered = re.findall(r'm\.impl\("(\w+)"', bindings()[OPERATORS])
    assert len(registered) >= 17
    assert set(registered) <= set().union(*called.values())


@on_pretend_cuda
def test_operators_in_a_graph_take_the_numbers_of_each_replay():
    x, weight = (torch.randn(rows, 24, device="cuda", requires_grad=True) for rows in (100, 101))
    targets, lr = torch.randint(0, 101, (100,), device="cuda"), torch.zeros((), dtype=torch.float64, device="cuda")
    params, firsts, seconds = ([torch.zeros(101, 24, device="cuda")] for _ in range(3))
    options = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.1}

    def step(params, firsts, seconds, lr):
        loss = ops.linear_cross_entropy(x, weight, targets)
        ops.adamw_(params, torch.autograd.grad(loss, (weight,)), firsts, seconds, step=3, lr=lr, **options)
        return loss

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(params, firsts, seconds, lr)
    copies = [[tensor.clone() for tensor in each] for each in (params, firsts, seconds)]
    for rate in (0.1, 0.3):
        lr.fill_(rate)
        x.data.mul_(-0.7)
        graph.replay()
        torch.testing.assert_close(loss, step(*copies, rate), rtol=0, atol=0)
        torch.testing.assert_close([params, firsts, seconds], copies, rtol=0, atol=0)
    assert params[0].any()


@pytest.fixture(scope="module")
def mutants(tmp_path_factory, called):
    if reason := unavailable():
        pytest.skip(reason)
    return library(tmp_path_factory.mktemp("mutants"), called)


def call_mutant(cases, library, number):
    import pretend_device

    pretend_device.load_operators(library, PRETEND_CUDA_MUTANT=str(number))
    for case in cases:
        CASES[case]()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=[mutation.name for mutation in MUTATIONS])
def test_defect_is_found(number, mutants, record_property):
    call = partial(call_mutant, [MUTATIONS[number].case], mutants, number)
    result = call_on_pretend_cuda(call, devices=2, check=False)
    assert result.returncode
    message = next(line for line in reversed(result.stderr.splitlines()) if re.search("Error|pretend CUDA", line))
    record_property("found", message)


@pytest.mark.slow
def test_nothing_is_found_where_nothing_is_wrong(mutants):
    cases = dict.fromkeys(mutation.case for mutation in MUTATIONS)
    call_on_pretend_cuda(partial(call_mutant, cases, mutants, len(MUTATIONS)), devices=2)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_text_of_a_defect_occurs_once(mutation):
    assert bindings()[mutation.file].count(mutation.old) == 1
    assert mutation.new != mutation.old


def test_there_are_enough_defects():
    assert len(MUTATIONS) >= 65
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
