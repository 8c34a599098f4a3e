import errno
import hashlib
import json
import pickle
import resource
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_native.runs import checkpoint
from nanochat_native.runs.checkpoint import CheckpointError

FILES = ("model.safetensors", "optimizer.safetensors", "meta.json", "manifest.json")


def content(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "w": torch.randn(3, 5, generator=generator),
            "half": torch.randn(7, generator=generator).bfloat16(),
        },
        "optimizer": {"w.step": torch.tensor(seed), "w.exp_avg": torch.randn(3, 5, generator=generator)},
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        a[group].keys() == b[group].keys()
        and all(a[group][n].dtype == b[group][n].dtype and torch.equal(a[group][n], b[group][n]) for n in a[group])
        for group in a
    )


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 10 and 20."""
    for step in (10, 20):
        checkpoint.save(tmp_path, step, content(step), {"note": f"of {step}"}, keep=3)
    return tmp_path


def test_what_is_saved_is_loaded(folder):
    tensors, meta = checkpoint.load(folder)
    assert same(tensors, content(20))
    assert meta == {"note": "of 20", "step": 20}
    tensors, meta = checkpoint.load(folder, step=10)
    assert same(tensors, content(10))
    assert meta["step"] == 10
    assert checkpoint.latest(folder) == 20


def test_views_and_transposes_are_saved_by_value(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    checkpoint.save(tmp_path, 1, {"model": {"t": base.T}}, {})
    assert torch.equal(checkpoint.load(tmp_path)[0]["model"]["t"], base.T)


def test_only_the_newest_are_kept(tmp_path):
    for step in range(5):
        checkpoint.save(tmp_path, step, content(step), {}, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000003", "step_000004"]


def test_a_damaged_later_checkpoint_never_displaces_an_intact_one(folder):
    (folder / "step_000020" / "model.safetensors").write_bytes(b"")
    checkpoint.save(folder, 15, content(15), {}, keep=1)
    with pytest.warns(UserWarning, match="step_000020"):
        assert checkpoint.load(folder)[1]["step"] == 15
    checkpoint.save(folder, 20, content(20), {}, keep=1)
    assert same(checkpoint.load(folder)[0], content(20))
    assert checkpoint.steps(folder) == [20]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, flip, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_the_previous_one_used(folder, name, harm):
    harm(folder / "step_000020" / name)
    said = []
    tensors, meta = checkpoint.load(folder, warn=said.append)
    assert same(tensors, content(10))
    assert meta["step"] == 10
    assert len(said) == 1
    assert str(folder / "step_000020" / name) in said[0]
    assert checkpoint.latest(folder) == 10
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(folder, step=20)
    harm(folder / "step_000010" / name)
    with pytest.raises(CheckpointError, match=r"step_000020.*step_000010"):
        checkpoint.load(folder)


@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_bit_loads_other_values(folder, name, place, bit):
    path = folder / "step_000020" / name
    original = path.read_bytes()
    harmed = bytearray(original)
    harmed[int(place * len(harmed))] ^= 1 << bit
    path.write_bytes(harmed)
    try:
        tensors, meta = checkpoint.load(folder, warn=lambda message: None)
        assert same(tensors, content(meta["step"]))
        assert meta["note"] == f"of {meta['step']}"
    finally:
        path.write_bytes(original)


def test_no_checkpoint_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            checkpoint.load(folder)
        assert checkpoint.latest(folder) is None


class Killed(BaseException):
    """Stands for the end of the process: nothing in the code may catch it."""


@pytest.mark.parametrize("where", ["save_file", "sha256_file", "fsync", "_move_into_place"])
def test_death_in_a_save_leaves_the_previous_checkpoint(folder, monkeypatch, where):
    real, calls = getattr(checkpoint, where), []

    def dying(*args):
        calls.append(args)
        if len(calls) == 2 or where == "_move_into_place":
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, where, dying)
        with pytest.raises(Killed):
            checkpoint.save(folder, 30, content(30), {}, keep=1)
    assert calls
    assert checkpoint.steps(folder) == [10, 20]
    assert same(checkpoint.load(folder)[0], content(20))
    checkpoint.save(folder, 30, content(30), {}, keep=1)
    assert [p.name for p in folder.iterdir()] == ["step_000030"]
    assert same(checkpoint.load(folder)[0], content(30))


def test_a_full_disk_is_noticed_before_anything_is_written(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    before = sorted(folder.rglob("*"))
    with pytest.raises(OSError, match="MB free") as error:
        checkpoint.save(folder, 30, content(30), {}, keep=1)
    assert error.value.errno == errno.ENOSPC
    assert sorted(folder.rglob("*")) == before


def test_a_write_that_fails_half_way_is_cleaned_up(folder):
    before = sorted(folder.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="step 30 could not be written"):
            checkpoint.save(folder, 30, {"model": {"big": torch.zeros(1 << 16)}}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(folder.rglob("*")) == before
    assert same(checkpoint.load(folder)[0], content(20))


def test_nothing_is_unpickled(folder, tmp_path):
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return (marker.touch, ())

    bomb = folder / "step_000020" / "model.safetensors"
    bomb.write_bytes(pickle.dumps(Payload()))
    manifest = json.loads((folder / "step_000020" / "manifest.json").read_text())
    manifest["files"][bomb.name] = {
        "bytes": bomb.stat().st_size,
        "sha256": hashlib.sha256(bomb.read_bytes()).hexdigest(),
    }
    (folder / "step_000020" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="step_000020"):
        checkpoint.load(folder, step=20)
    assert not marker.exists()


@pytest.mark.parametrize(("step", "keep"), [(-1, 1), (1, 0)])
def test_bad_arguments_are_refused_before_any_work(tmp_path, step, keep):
    with pytest.raises(ValueError, match=r"must be >= \d, got"):
        checkpoint.save(tmp_path / "new", step, content(0), {}, keep=keep)
    assert not (tmp_path / "new").exists()


def training(seed=0, groups=1):
    generator = torch.Generator().manual_seed(seed)
    named = [(name, torch.nn.Parameter(torch.randn(4, 3, generator=generator))) for name in ("a.weight", "b.weight")]
    parameters = [parameter for _, parameter in named]
    if groups == 1:
        return named, [
            torch.optim.Adam(parameters),
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], momentum=0.9),
        ]
    return named, [torch.optim.Adam([{"params": [p]} for p in reversed(parameters)])]


def advance(named, optimizers, steps):
    for step in range(steps):
        for _, parameter in named:
            parameter.grad = parameter.detach() * (step + 1)
        for optimizer in optimizers:
            optimizer.step()


def test_optimizer_state_goes_by_name_and_continues_bit_for_bit(tmp_path):
    named, optimizers = training()
    advance(named, optimizers, 3)
    tensors, scalars = checkpoint.flatten_optimizers(named, optimizers)
    assert set(tensors) == {f"{n}.weight.{key}" for n in "ab" for key in ("step", "exp_avg", "exp_avg_sq")}
    weights = {name: parameter.detach() for name, parameter in named}
    checkpoint.save(tmp_path, 3, {"model": weights, "optimizer": tensors}, {"optimizer": scalars})
    advance(named, optimizers, 2)

    again, other = training(seed=1, groups=2)
    loaded, meta = checkpoint.load(tmp_path)
    for name, parameter in again:
        parameter.data.copy_(loaded["model"][name])
    checkpoint.restore_optimizers(again, other, loaded["optimizer"], meta["optimizer"])
    advance(again, other, 2)
    for (_, expected), (_, got) in zip(named, again, strict=True):
        assert torch.equal(expected, got)


def test_state_of_an_unknown_parameter_is_refused():
    named, optimizers = training()
    with pytest.raises(CheckpointError, match=r"c\.weight\.exp_avg"):
        checkpoint.restore_optimizers(named, optimizers, {"c.weight.exp_avg": torch.zeros(1)}, {})
