import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
import torch_reference
from backends import BACKENDS, use

from nanochat_native import ops
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.ops import weight_copies

CONFIG = GPTConfig(sequence_len=32, vocab_size=97, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL")
WINDOWS = [8, None, None]  # of CONFIG: sequence_len // 4 for S; the last layer sees all


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use(request.param):
        yield request.param


def build(config=CONFIG, seed=0, **kwargs):
    """A model whose zero-initialised matrices are filled, so that every weight shows in the output."""
    model = GPT(config, **kwargs)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def tokens(batch=2, length=32, seed=0, vocab_size=CONFIG.vocab_size):
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def double_weights(model):
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (CONFIG, WINDOWS),
        (dataclasses.replace(CONFIG, n_kv_head=4, window_pattern="L"), [None] * 3),
        (dataclasses.replace(CONFIG, n_kv_head=1, window_pattern="SSL", n_layer=5), [8, 8, None, 8, None]),
        (dataclasses.replace(CONFIG, n_head=1, n_kv_head=1, n_layer=1, window_pattern="S"), [None]),
    ],
    ids=["gqa-window", "mha", "mqa-window", "one-layer"],
)
def test_logits_loss_and_gradients_against_plain_torch(backend, config, windows):
    model = build(config)
    idx, targets = tokens(seed=1), tokens(seed=2)
    targets[0, :5] = -1
    weights = double_weights(model)
    expected = torch_reference.logits(weights, config, windows, idx)
    assert config.windows == windows
    logits = model(idx)
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 32, 97)
    assert torch.allclose(logits.double(), expected, atol=2e-5, rtol=0)
    assert expected.std() > 0.3, "the weights do not show in the logits"

    loss = model(idx, targets)
    loss.backward()
    expected_loss = torch_reference.loss(weights, config, windows, idx, targets)
    expected_loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected_loss.item(), abs=2e-6)
    for name, parameter in model.named_parameters():
        difference = (parameter.grad.double() - weights[name].grad).norm() / weights[name].grad.norm()
        assert difference < 2e-5, name


def test_gradients_in_float64_are_exact(backend):
    """The hand-written norm, rotation and squared ReLU against autograd's, far below float32's rounding."""
    model = build().double()
    idx, targets = tokens(seed=1), tokens(seed=2)
    weights = double_weights(model)
    expected = torch_reference.loss(weights, CONFIG, WINDOWS, idx, targets)
    expected.backward()
    loss = model(idx, targets)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-8)  # the rotary tables are float32
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, weights[name].grad, atol=1e-7, rtol=1e-6), name


def test_reductions_and_ignored_targets(backend):
    model = build()
    idx, targets = tokens(seed=1), tokens(seed=2)
    targets[1, 3:9] = -1
    with torch.no_grad():
        each = model(idx, targets, reduction="none")
        assert each.shape == targets.shape
        assert (each[1, 3:9] == 0).all()
        total = each.double().sum()
        assert model(idx, targets, reduction="sum").item() == pytest.approx(total.item(), rel=1e-6)
        assert model(idx, targets).item() == pytest.approx(total.item() / 58, rel=1e-6)


def test_first_loss_is_ln_v():
    model = GPT(CONFIG)
    model.init_weights()
    with use("torch"):
        assert model(tokens(seed=1), tokens(seed=2)).item() == pytest.approx(math.log(97), abs=1e-6)


def test_same_seed_same_bits(backend):
    def run():
        model = build(seed=3)
        model(tokens(), tokens(seed=1)).backward()
        return [p.grad.clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_parameter_names_and_shapes():
    blocks = {
        "attn.c_q": (64, 64),
        "attn.c_k": (32, 64),
        "attn.c_v": (32, 64),
        "attn.c_proj": (64, 64),
        "mlp.c_fc": (256, 64),
        "mlp.c_proj": (64, 256),
    }
    expected = {"transformer.wte.weight": (97, 64), "lm_head.weight": (97, 64)}
    expected |= {f"transformer.h.{i}.{name}.weight": shape for i in range(3) for name, shape in blocks.items()}
    model = GPT(CONFIG)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert set(model.state_dict()) == set(expected), "the rotary tables must stay out of checkpoints"
    assert model.num_params() == sum(math.prod(shape) for shape in expected.values())
    assert model.cos.dtype == model.sin.dtype == torch.float32


def test_meta_initialisation_gives_the_same_model():
    direct = GPT(CONFIG)
    direct.init_weights(7)
    with torch.device("meta"):
        model = GPT(CONFIG)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.cos.fill_(math.nan)
    model.init_weights(7)
    assert all(torch.equal(a, b) for a, b in zip(direct.parameters(), model.parameters(), strict=True))
    assert torch.equal(direct.cos, model.cos)
    assert torch.equal(direct.sin, model.sin)


def test_initialisation_is_nanochats():
    config = dataclasses.replace(CONFIG, n_embd=256, n_head=4, n_kv_head=1, n_layer=1, vocab_size=500)
    model = GPT(config)
    model.init_weights(1)
    weights = dict(model.named_parameters())
    assert not weights["lm_head.weight"].any()
    assert not weights["transformer.h.0.attn.c_proj.weight"].any()
    assert not weights["transformer.h.0.mlp.c_proj.weight"].any()
    for name, std in {
        "transformer.wte.weight": 1.0,
        "transformer.h.0.attn.c_q.weight": 1 / 16,
        "transformer.h.0.attn.c_k.weight": 1 / 16 * math.sqrt(64 / 256),
        "transformer.h.0.mlp.c_fc.weight": 1 / 16,
    }.items():
        weight = weights[name]
        assert weight.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel()), name
    other = GPT(config)
    other.init_weights(2)
    assert not torch.equal(other.wte.weight, model.wte.weight)


def test_gradient_checkpointing_changes_no_bit(backend):
    runs = []
    for grad_checkpoint in (False, True):
        model = build(grad_checkpoint=grad_checkpoint)
        loss = model(tokens(), tokens(seed=1))
        loss.backward()
        runs.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradient_checkpointing_computes_blocks_again(monkeypatch):
    calls = []
    attention = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args, **kwargs: (calls.append(1), attention(*args, **kwargs))[1])
    with use("torch"):
        for grad_checkpoint, expected in ((False, 3), (True, 6)):
            calls.clear()
            build(grad_checkpoint=grad_checkpoint)(tokens(), tokens(seed=1)).backward()
            assert len(calls) == expected


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_the_backward_pass_casts_no_weight(backend, grad_checkpoint, monkeypatch):
    """It uses the copies that the forward pass made, also where checkpoint gives back detached weights."""
    writes = []
    write = weight_copies._write
    monkeypatch.setattr(weight_copies, "_write", lambda *args: (writes.append(args[0].shape), write(*args))[1])
    model = build(grad_checkpoint=grad_checkpoint)
    weight_copies.keep(model.parameters())
    for expected in (6 * 3 + 1, 0):  # the weights of the blocks and lm_head; then none
        writes.clear()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens(), tokens(seed=1))
        loss.backward()
        assert len(writes) == expected


def test_last_only_is_the_last_row(backend):
    model, idx = build(), tokens()
    with torch.no_grad():
        assert torch.allclose(model(idx, last_only=True), model(idx)[:, -1:], atol=1e-5, rtol=0)


def test_positions_reach_beyond_the_training_length():
    model = build(dataclasses.replace(CONFIG, sequence_len=4))
    assert model.max_positions == 40
    with use("torch"), torch.no_grad():
        idx = tokens(length=40)
        weights = dict(model.named_parameters())
        expected = torch_reference.logits(weights, model.config, [1, None, None], idx)
        assert torch.allclose(model(idx), expected, atol=2e-5, rtol=0)
        with pytest.raises(ValueError, match="at most 40 tokens in a sequence, 10 times sequence_len 4, got 41"):
            model(tokens(length=41))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 0}, "n_layer must be a whole number >= 1, got 0"),
        ({"vocab_size": -5}, "vocab_size must be a whole number >= 1, got -5"),
        ({"sequence_len": 1.5}, "sequence_len must be a whole number >= 1, got 1.5"),
        ({"n_embd": 65}, "n_embd / n_head must be an even whole number, got 65 / 4"),
        ({"n_embd": 12}, "got 12 / 4"),
        ({"n_kv_head": 3}, "n_head must be a multiple of n_kv_head 3, got 4"),
        ({"window_pattern": ""}, "window_pattern"),
        ({"window_pattern": "SXL"}, "SXL"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("depth", "head_dim", "width", "heads"),
    [
        (4, 64, 256, 4),
        (4, 128, 256, 2),
        (20, 128, 1280, 10),
        (1, 128, 64, 1),
        (3, 128, 192, 2),
        (5, 128, 320, 4),
        (7, 128, 448, 4),
    ],
)
def test_from_depth(depth, head_dim, width, heads):
    config = GPTConfig.from_depth(depth, vocab_size=100, sequence_len=16, head_dim=head_dim)
    assert (config.n_layer, config.n_embd, config.n_head, config.n_kv_head) == (depth, width, heads, heads)


def test_from_depth_refuses_nonsense():
    with pytest.raises(ValueError, match="depth must be >= 1 and head_dim >= 2, got 0 and 128"):
        GPTConfig.from_depth(0, vocab_size=100, sequence_len=16)
    with pytest.raises(ValueError, match="n_kv_head 3"):
        GPTConfig.from_depth(4, vocab_size=100, sequence_len=16, head_dim=64, n_kv_head=3)


def test_bad_inputs_are_refused():
    model, idx = build(), tokens()
    with use("torch"):
        with pytest.raises(TypeError, match="int32"):
            model(idx.int())
        with pytest.raises(ValueError, match=r"\(32,\)"):
            model(idx[0])
        with pytest.raises(ValueError, match=r"\(2, 0\)"):
            model(idx[:, :0])
        with pytest.raises(ValueError, match=r"the shape of idx, \(2, 32\), got \(2, 31\)"):
            model(idx, idx[:, 1:])
        with pytest.raises(ValueError, match="last_only"):
            model(idx, idx, last_only=True)
        with pytest.raises(ValueError, match="97"):
            model(idx, torch.full_like(idx, 97))


def test_flops_are_nanochats_formula():
    config = GPTConfig(sequence_len=2048, vocab_size=65536, n_layer=20, n_head=10, n_kv_head=10, n_embd=1280)
    with torch.device("meta"):
        model = GPT(config)
    assert model.num_params() == 560_988_160
    assert model.estimate_flops() == 6 * (560_988_160 - 65536 * 1280) + 12 * 20 * 10 * 128 * 2048
    with torch.device("meta"):
        windowed = GPT(dataclasses.replace(config, window_pattern="SSSL"))
    assert model.estimate_flops() - windowed.estimate_flops() == 12 * 15 * 1280 * (2048 - 512)


def test_autocast_runs_the_blocks_in_bfloat16(backend):
    model, idx, targets = build(), tokens(), tokens(seed=1)
    seen = []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out[0].dtype))
    exact = model(idx, targets).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)
        assert model(idx).dtype == torch.float32
    loss.backward()
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert loss.item() == pytest.approx(exact, abs=0.05)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_compiles_into_one_graph(backend):
    model, idx, targets = build(), tokens(), tokens(seed=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(idx, targets)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = model(idx, targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("n_kv_head", [4, 1])
def test_agrees_with_transformers(backend, n_kv_head):
    transformers = pytest.importorskip("transformers", reason="transformers, an oracle and no dependency, is missing")
    if not hasattr(transformers, "NanoChatForCausalLM"):
        pytest.skip("this transformers has no NanoChatForCausalLM")
    config = dataclasses.replace(CONFIG, n_kv_head=n_kv_head, window_pattern="L")
    theirs = transformers.NanoChatForCausalLM(
        transformers.NanoChatConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=4 * config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            max_position_embeddings=config.sequence_len,
            rms_norm_eps=torch_reference.EPS,
            rope_parameters={"rope_type": "default", "rope_theta": 10000},
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    model = build(config)
    names = {
        "attn.c_q": "self_attn.q_proj",
        "attn.c_k": "self_attn.k_proj",
        "attn.c_v": "self_attn.v_proj",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    state = {"model.embed_tokens.weight": model.wte.weight, "lm_head.weight": model.lm_head.weight}
    for name, parameter in model.named_parameters():
        if name.startswith("transformer.h."):
            layer, inner = name.removeprefix("transformer.h.").removesuffix(".weight").split(".", 1)
            state[f"model.layers.{layer}.{names[inner]}.weight"] = parameter
    theirs.load_state_dict(state)
    with torch.no_grad():
        idx = tokens()
        assert torch.allclose(model(idx), theirs(idx).logits, atol=1e-5, rtol=0)


def test_what_a_layer_keeps_for_the_backward_pass():
    """Of its activations: one four times as wide, and six of the width of the model where k and v are as wide as q."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def bytes_kept(n_layer):
        model = build(dataclasses.replace(CONFIG, n_kv_head=4, n_layer=n_layer))
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens(), tokens(seed=1))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert loss.requires_grad
        return sum(size for pointer, size in kept.items() if pointer not in weights)

    with use("native"):
        a_layer = bytes_kept(4) - bytes_kept(3)
    rows, width, heads = 2 * 32, 64, 4
    statistics = rows * (2 + 2 * heads + heads)  # of two norms, of q and k, and of the softmax
    assert a_layer == 4 * (rows * width * (4 + 6) + statistics)


def test_loss_holds_no_logits():
    """Peak memory of a training step stays far below one (B, T, V) float32 tensor; plain torch holds several."""
    program = """
import resource, torch
from nanochat_native.model import GPT, GPTConfig
torch.set_num_threads(1)
model = GPT(GPTConfig(sequence_len=256, vocab_size=50000, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
model.init_weights()
idx = torch.zeros(16, 256, dtype=torch.int64)
model(idx[:1, :8], idx[:1, :8]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model(idx, idx).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    env = {**os.environ, "NANOCHAT_NATIVE_BACKEND": "native"}
    with use("native"):
        out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
    logits_mib = 16 * 256 * 50000 * 4 / 2**20
    assert float(out.stdout) < logits_mib / 4
