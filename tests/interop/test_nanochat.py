"""Checkpoints in nanochat's layout of today: import, export, and both ways round without a changed bit."""

import json
import pickle
import shutil

import pytest
import tiktoken
import torch
from tiny_run import train, write_text

from nanochat_native import export, finetune, import_checkpoint
from nanochat_native.data import conversations
from nanochat_native.data.tokenizer import SPECIAL_TOKENS
from nanochat_native.inference.engine import complete
from nanochat_native.inference.sampling import Sampling
from nanochat_native.interop import nanochat_export
from nanochat_native.interop.nanochat_files import read_tokenizer_pickle
from nanochat_native.model.config import ARCHITECTURES, GPTConfig
from nanochat_native.runs.run_folder import load_config
from nanochat_native.runs.saved_model import load_model

V, C, L, H, G, T = 268, 32, 3, 2, 1, 32
D = C // H
PADDED = 320  # 268 rounded up to a multiple of 64
SHAPE = {"sequence_len": T, "vocab_size": V, "n_layer": L, "n_head": H, "n_kv_head": G, "n_embd": C}
BASE_FLAGS = {"depth": L, "core_metric_every": 2000, "window_pattern": "SSSL"}
SFT_FLAGS = {"load_optimizer": 1, "chatcore_every": 200}


def shapes(*, rows):
    """Every parameter of nanochat's first version and its shape, with this number of rows for the vocabulary."""
    shapes = {"transformer.wte.weight": (rows, C)}
    for i in range(L):
        shapes |= {
            f"transformer.h.{i}.attn.c_q.weight": (C, C),
            f"transformer.h.{i}.attn.c_k.weight": (G * D, C),
            f"transformer.h.{i}.attn.c_v.weight": (G * D, C),
            f"transformer.h.{i}.attn.c_proj.weight": (C, C),
            f"transformer.h.{i}.mlp.c_fc.weight": (4 * C, C),
            f"transformer.h.{i}.mlp.c_proj.weight": (C, 4 * C),
        }
    return shapes | {"lm_head.weight": (rows, C)}


TODAYS_PARTS = {
    "residual scalars": {"resid_lambdas": (L,), "x0_lambdas": (L,)},
    "smear": {"smear_gate.weight": (1, 24), "smear_lambda": (1,)},
    "backout": {"backout_lambda": (1,)},
    "value embeddings": {
        "transformer.h.0.attn.ve_gate.weight": (G, 12),
        "transformer.h.2.attn.ve_gate.weight": (G, 12),
        "value_embeds.0.weight": (PADDED, G * D),
        "value_embeds.2.weight": (PADDED, G * D),
    },
}
TODAY = {name: shape for part in TODAYS_PARTS.values() for name, shape in part.items()} | shapes(rows=PADDED)
EMBEDDINGS = ("transformer.wte.", "value_embeds.")


def tensors_of(shapes, embeddings=torch.bfloat16, others=torch.float32):
    """Random tensors of the shapes, with the embeddings in a type of their own, as nanochat stores them."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator).to(embeddings if name.startswith(EMBEDDINGS) else others)
        for name, shape in shapes.items()
    }


def write_checkpoint(place, tensors, meta, *, folder="base_checkpoints", tag="d3", step=650):
    """Write a checkpoint and a tokenizer in nanochat's layout; return the folder of the checkpoint."""
    source = place / folder / tag
    source.mkdir(parents=True)
    torch.save(tensors, source / f"model_{step:06d}.pt")
    (source / f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=2))
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the"]
    encoding = tiktoken.Encoding(
        "rustbpe",
        pat_str=r"\p{L}+|\s+|.",
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)},
    )
    (place / "tokenizer").mkdir()
    (place / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    sizes = torch.tensor([len(token) for token in tokens] + [0] * len(SPECIAL_TOKENS), dtype=torch.int32)
    torch.save(sizes, place / "tokenizer" / "token_bytes.pt")
    return source


def base_meta(**changes):
    shape = SHAPE | {"window_pattern": "SSSL"} | changes
    loop = {"min_val_bpb": 1.25, "smooth_train_loss": 2.5, "total_training_time": 3.0}
    return {
        "step": 650,
        "val_bpb": 1.25,
        "model_config": shape,
        "user_config": BASE_FLAGS,
        "device_batch_size": 32,
        "max_seq_len": T,
        "total_batch_size": 524288,
        "dataloader_state_dict": {"pq_idx": 0, "rg_idx": 3, "epoch": 1},
        "loop_state": loop,
    }


def import_(source, out, *args):
    return import_checkpoint.main([str(source), "--out", str(out), *args])


def export_(run, out, *args):
    return export.main(["--checkpoint", str(run), "--out", str(out), "--format", "nanochat", *args])


def bits(tensor):
    """The bytes of a tensor, which tell 0.0 from -0.0 and a NaN from another."""
    return tensor.contiguous().view(torch.uint8)


def assert_same_files(a, b):
    """Both base directories have the same files, with the same content to the bit."""
    paths = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert paths == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file() and path.name != "README.md")
    for path in paths:
        if path.suffix == ".json":
            assert (a / path).read_bytes() == (b / path).read_bytes()
        elif path.name.startswith("model_"):
            first, second = (torch.load(place / path, weights_only=True) for place in (a, b))
            assert list(first) == list(second)
            for name, tensor in first.items():
                assert (tensor.dtype, tensor.shape) == (second[name].dtype, second[name].shape), name
                assert torch.equal(bits(tensor), bits(second[name])), name
        elif path.name == "token_bytes.pt":
            first, second = (torch.load(place / path, weights_only=True) for place in (a, b))
            assert first.dtype == second.dtype
            assert torch.equal(first, second)
        else:
            assert path.name == "tokenizer.pkl"
            first, second = (pickle.loads((place / path).read_bytes()) for place in (a, b))
            assert first.__getstate__() == second.__getstate__()


# Folder of nanochat, meta as the script of that folder writes it, and whether the model chats.
PHASES = [
    pytest.param("base_checkpoints", base_meta(), False, id="base"),
    pytest.param(
        "chatsft_checkpoints",
        {"step": 650, "val_bpb": 0.5, "model_config": base_meta()["model_config"], "user_config": SFT_FLAGS},
        True,
        id="sft",
    ),
    pytest.param("chatrl_checkpoints", {"model_config": base_meta()["model_config"]}, True, id="rl"),
]


@pytest.mark.parametrize(("folder", "meta", "chat"), PHASES)
def test_a_checkpoint_of_today_is_imported_bit_for_bit(tmp_path, folder, meta, chat, capsys):
    tensors = tensors_of(TODAY)
    source = write_checkpoint(tmp_path / "nanochat", tensors, meta, folder=folder)
    assert import_(source, tmp_path / "run") == 0
    assert "note" not in capsys.readouterr().out
    model, tokenizer, found = load_model(tmp_path / "run")
    assert model.config == GPTConfig(**SHAPE, window_pattern="SSSL", **ARCHITECTURES["today"])
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(parameters[name].detach(), tensor.float()), name
    assert (found["step"], found["validation_bpb"]) == (650, meta.get("val_bpb"))
    assert conversations.is_chat_trained(found) == chat
    assert tokenizer.vocab_size == V


@pytest.mark.parametrize(("folder", "meta", "chat"), PHASES)
def test_import_and_export_write_the_same_files(tmp_path, folder, meta, chat):
    tensors = tensors_of(TODAY)
    tensors["transformer.wte.weight"][0, :2] = torch.tensor([-0.0, 2.0**-133])  # a subnormal number of bfloat16
    source = write_checkpoint(tmp_path / "nanochat", tensors, meta, folder=folder, tag="my-model")
    assert import_(source, tmp_path / "run") == 0
    assert export_(tmp_path / "run", tmp_path / "back") == 0
    assert_same_files(tmp_path / "nanochat", tmp_path / "back")


@pytest.mark.parametrize("rows", [V, PADDED, 300])
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_a_checkpoint_of_october_comes_back_with_its_padding(tmp_path, rows, types):
    meta = {"step": 650, "val_bpb": 1.25, "model_config": SHAPE}
    source = write_checkpoint(tmp_path / "nanochat", tensors_of(shapes(rows=rows), *types), meta)
    assert import_(source, tmp_path / "run") == 0
    model, _, _ = load_model(tmp_path / "run")
    assert not model.config.parts_beyond("october")
    assert model.lm_head.weight.shape == (V, C)
    assert export_(tmp_path / "run", tmp_path / "back") == 0
    assert_same_files(tmp_path / "nanochat", tmp_path / "back")


@pytest.mark.parametrize(
    ("architecture", "packing", "validation"), [("today", "bestfit", "shards"), ("october", "stream", "fraction")]
)
def test_an_imported_model_is_measured_on_the_rows_of_its_version(tmp_path, architecture, packing, validation):
    parameters = TODAY if architecture == "today" else shapes(rows=V)
    meta = base_meta() if architecture == "today" else base_meta(window_pattern="L")
    source = write_checkpoint(tmp_path / "nanochat", tensors_of(parameters), meta)
    assert import_(source, tmp_path / "run") == 0
    config = load_config(tmp_path / "run")
    assert (config.recipe, config.packing, config.validation) == (architecture, packing, validation)


@pytest.mark.parametrize("missing", TODAYS_PARTS)
def test_a_version_between_october_and_today_is_refused_with_the_missing_part(tmp_path, missing, capsys):
    tensors = {name: tensor for name, tensor in tensors_of(TODAY).items() if name not in TODAYS_PARTS[missing]}
    source = write_checkpoint(tmp_path / "nanochat", tensors, base_meta())
    assert import_(source, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source / 'model_000650.pt'} has ")
    assert f", but no {missing}: it is of a version of nanochat from January to March 2026" in error
    assert all(part in error.split("but no")[0] for part in TODAYS_PARTS if part != missing)
    assert "use that version of nanochat, or train the model again with today's" in error
    assert not (tmp_path / "run").exists()


def test_every_missing_part_is_named(tmp_path, capsys):
    tensors = tensors_of(shapes(rows=PADDED) | TODAYS_PARTS["residual scalars"])
    source = write_checkpoint(tmp_path / "nanochat", tensors, base_meta())
    assert import_(source, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "has residual scalars, but no value embeddings, no smear, no backout: it is of a version" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"smear_lambda": None}, "missing smear_lambda"),
        ({"value_embeds.2.weight": None}, "missing value_embeds.2.weight"),
        ({"value_embeds.1.weight": torch.ones(PADDED, D)}, "unknown value_embeds.1.weight"),
        ({"transformer.h.0.attn.ve_gate.weight": torch.ones(G, 32)}, "must have shape (1, 12), got (1, 32)"),
        ({"lm_head.weight": torch.ones(V, C)}, "lm_head.weight must have shape (320, 32), got (268, 32)"),
        ({"resid_lambdas": torch.ones(L).fill_(torch.nan)}, "resid_lambdas has values that are not finite"),
        ({"resid_lambdas": torch.ones(L).double()}, "resid_lambdas must be float32, bfloat16 or float16, got float64"),
    ],
)
def test_a_damaged_checkpoint_of_today_is_refused(tmp_path, change, message, capsys):
    tensors = {name: tensor for name, tensor in (tensors_of(TODAY) | change).items() if tensor is not None}
    source = write_checkpoint(tmp_path / "nanochat", tensors, base_meta())
    assert import_(source, tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_padding_that_is_not_finite_is_refused(tmp_path, capsys):
    tensors = tensors_of(shapes(rows=PADDED))
    tensors["lm_head.weight"][PADDED - 1] = torch.inf
    source = write_checkpoint(tmp_path / "nanochat", tensors, {"model_config": SHAPE})
    assert import_(source, tmp_path / "run") == 2
    assert "lm_head.weight has values that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("L", "L"),
        ("sl", "SL"),
        ("SX", "window_pattern must be a word of the letters L and S, such as SSSL, got 'SX'"),
        ("", "window_pattern must be a word"),
        (None, "window_pattern must be a text, got None"),
        (["S"], "window_pattern must be a text, got ['S']"),
    ],
)
def test_the_window_pattern_is_read_as_nanochat_reads_it(tmp_path, pattern, expected, capsys):
    source = write_checkpoint(tmp_path / "nanochat", tensors_of(TODAY), base_meta(window_pattern=pattern))
    code = import_(source, tmp_path / "run")
    if len(expected) > 2:
        assert code == 2
        assert f"{source / 'meta_000650.json'}: {expected}" in capsys.readouterr().err
    else:
        assert code == 0
        model, _, _ = load_model(tmp_path / "run")
        assert model.config.window_pattern == expected
        assert model.config.windows == [128 if letter == "S" else T for letter in (expected * L)[: L - 1]] + [T]


@pytest.mark.parametrize(
    ("flags", "args", "chat", "noted"),
    [
        (BASE_FLAGS, [], False, False),
        (SFT_FLAGS, [], True, False),
        ({}, [], False, True),
        (None, [], False, True),
        (None, ["--chat"], True, False),
    ],
)
def test_outside_of_nanochats_folders_the_meta_tells_whether_a_model_chats(tmp_path, flags, args, chat, noted, capsys):
    meta = base_meta() | {"user_config": flags}
    source = write_checkpoint(tmp_path / "nanochat", tensors_of(TODAY), meta, folder="downloads")
    assert import_(source, tmp_path / "run", *args) == 0
    note = (
        "note     whether it was trained on conversations is not recorded: it is taken for a base model without --chat"
    )
    assert (note in capsys.readouterr().out) == noted
    assert conversations.is_chat_trained(load_model(tmp_path / "run")[2]) == chat
    assert export_(tmp_path / "run", tmp_path / "back") == 0
    phase = "chatsft_checkpoints" if chat else "base_checkpoints"
    assert (tmp_path / "back" / phase / "d3" / "model_000650.pt").is_file()
    card = (tmp_path / "back" / "README.md").read_text()
    assert f"python -m scripts.{'chat_cli -i sft -g d3' if chat else 'base_eval --eval sample --model-tag d3'}" in card


def test_a_tokenizer_beside_the_weights_is_found(tmp_path):
    source = write_checkpoint(tmp_path / "nanochat", tensors_of(TODAY), base_meta())
    shutil.move(tmp_path / "nanochat/tokenizer/tokenizer.pkl", source / "tokenizer.pkl")
    assert import_(source, tmp_path / "run") == 0


# --- export of other runs ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_text(folder / "text.jsonl")
    torch.set_num_threads(1)
    assert train(folder, run="october", steps=4, vocab_size=300, recipe="october") == 0
    assert train(folder, run="windows", steps=2, window_pattern="SL", recipe="october") == 0
    assert train(folder, run="today", steps=2, vocab_size=300, recipe="today") == 0
    return folder


def test_a_run_of_october_is_written_as_nanochats_first_version_reads_it(folder, tmp_path, capsys):
    run, out = folder / "runs/october", tmp_path / "out"
    assert export_(run, out) == 0
    assert "nanochat, float32" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "It is a base directory of nanochat of October 2025 with the checkpoint `base_checkpoints/d2`.\n" in card
    assert "```" not in card, "the commands of today's nanochat do not open it"
    model, tokenizer, meta = load_model(run)
    source = out / "base_checkpoints" / "d2"
    state = torch.load(source / "model_000004.pt", weights_only=True)
    parameters = dict(model.named_parameters())
    assert list(state) == list(parameters)
    assert all(torch.equal(state[name], parameters[name]) for name in state)
    found = json.loads((source / "meta_000004.json").read_text())
    shape = {"sequence_len": 32, "vocab_size": 300, "n_layer": 2, "n_head": 4, "n_kv_head": 4, "n_embd": 128}
    assert found["model_config"] == shape  # the first version knows no other key
    assert (found["step"], found["val_bpb"]) == (4, meta["validation_bpb"])
    assert (found["max_seq_len"], found["device_batch_size"], found["total_batch_size"]) == (32, 2, 128)
    read = read_tokenizer_pickle(out / "tokenizer" / "tokenizer.pkl")
    assert read.hash == tokenizer.hash
    encoding = pickle.loads((out / "tokenizer" / "tokenizer.pkl").read_bytes())
    assert encoding.n_vocab == 300
    assert encoding.encode_ordinary("the tensor") == tokenizer.encode("the tensor")
    assert encoding.encode_single_token("<|bos|>") == tokenizer.bos_id
    sizes = torch.load(out / "tokenizer" / "token_bytes.pt", weights_only=True)
    assert sizes.dtype == torch.int32
    assert sizes.tolist() == tokenizer.token_bytes.tolist()
    assert import_(source, tmp_path / "again") == 0
    again = dict(load_model(tmp_path / "again")[0].named_parameters())
    assert all(torch.equal(again[name], parameters[name]) for name in parameters)


def test_a_run_of_today_is_written_as_nanochat_reads_it_and_comes_back(folder, tmp_path):
    run, out = folder / "runs/today", tmp_path / "out"
    assert export_(run, out) == 0
    model, tokenizer, _ = load_model(run)
    source = out / "base_checkpoints" / "d2"
    state = torch.load(source / "model_000002.pt", weights_only=True)
    parameters = dict(model.named_parameters())
    assert list(state) == list(parameters)
    assert "smear_lambda" in state
    assert all(torch.equal(state[name], parameters[name]) for name in state)
    assert state["value_embeds.1.weight"].shape == (320, 128)
    shape = json.loads((source / "meta_000002.json").read_text())["model_config"]
    assert shape["window_pattern"] == "SSSL"
    assert GPTConfig(**shape, **ARCHITECTURES["today"]) == model.config
    assert import_(source, tmp_path / "again") == 0
    again, read, _ = load_model(tmp_path / "again")
    assert (again.config, read.hash) == (model.config, tokenizer.hash)
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in again.named_parameters())


def test_a_model_of_transformers_is_written_without_a_batch_that_nobody_knows(folder, tmp_path):
    assert export.main(["--checkpoint", str(folder / "runs/october"), "--out", str(tmp_path / "hf")]) == 0
    assert import_(tmp_path / "hf", tmp_path / "run") == 0
    assert export_(tmp_path / "run", tmp_path / "out") == 0
    meta = json.loads((tmp_path / "out/base_checkpoints/d2/meta_000000.json").read_text())
    assert meta.keys() == {"step", "val_bpb", "model_config"}


def test_an_imported_model_of_today_is_fine_tuned(folder, tmp_path):
    source = write_checkpoint(tmp_path / "nanochat", tensors_of(TODAY), base_meta())
    assert import_(source, tmp_path / "run") == 0
    assert load_config(tmp_path / "run").architecture == "today"
    chats = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the"}]}] * 40
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    args = ["--checkpoint", str(tmp_path / "run"), "--data", str(tmp_path / "chats.jsonl"), "--device", "cpu"]
    args += ["--num-iterations", "2", "--run", "tuned", "--out-dir", str(tmp_path), "--cache-dir", str(tmp_path)]
    assert finetune.main([*args, "--device-batch-size", "2", "--batch-rows", "4"]) == 0
    model, _, meta = load_model(tmp_path / "tuned")
    assert model.config == load_model(tmp_path / "run")[0].config
    assert (meta["base"]["step"], meta["base"]["imported"]) == (650, True)
    assert export_(tmp_path / "tuned", tmp_path / "back") == 0
    state = torch.load(tmp_path / "back/chatsft_checkpoints/d3/model_000002.pt", weights_only=True)
    assert state.keys() == TODAY.keys()
    assert not torch.equal(state["value_embeds.2.weight"], tensors_of(TODAY)["value_embeds.2.weight"].float())


def test_bfloat16_is_for_the_embeddings_as_in_nanochats_files(folder, tmp_path, capsys):
    assert export_(folder / "runs/october", tmp_path / "out", "--dtype", "bfloat16") == 0
    assert "nanochat, float32, the embeddings in bfloat16" in capsys.readouterr().out
    state = torch.load(tmp_path / "out/base_checkpoints/d2/model_000004.pt", weights_only=True)
    kinds = {name: tensor.dtype for name, tensor in state.items()}
    assert kinds.pop("transformer.wte.weight") == torch.bfloat16
    assert set(kinds.values()) == {torch.float32}


def test_a_given_type_replaces_those_of_the_imported_file(tmp_path):
    source = write_checkpoint(tmp_path / "nanochat", tensors_of(TODAY, torch.bfloat16), base_meta())
    assert import_(source, tmp_path / "run") == 0
    assert export_(tmp_path / "run", tmp_path / "back", "--dtype", "float32") == 0
    state = torch.load(tmp_path / "back/base_checkpoints/d3/model_000650.pt", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    shutil.rmtree(tmp_path / "back")
    assert export_(tmp_path / "run", tmp_path / "back", "--dtype", "bfloat16") == 0
    state = torch.load(tmp_path / "back/base_checkpoints/d3/model_000650.pt", weights_only=True)
    assert {name for name, tensor in state.items() if tensor.dtype == torch.bfloat16} == {
        name for name in TODAY if name.startswith(EMBEDDINGS)
    }


def test_what_nanochat_cannot_express_is_refused_by_name(folder, tmp_path, capsys):
    assert export_(folder / "runs/windows", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "error: nanochat has no such model: " in error
    assert "or window_pattern as in --architecture october" in error
    assert "--format safetensors supports every model" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, None),
        ({"initialization": "normal"}, None),
        ({"smear": False}, "smear must be as in --architecture today"),
        ({"qk_scale": 1.15, "rotary_base": 10_000}, "qk_scale, rotary_base must be as in --architecture today"),
        ({"vocab_multiple": 1}, "vocab_multiple must be as in --architecture today"),
        ({"vocab_multiple": 1, "vocab_size": 320}, None),
        (ARCHITECTURES["october"], None),
        (ARCHITECTURES["october"] | {"initialization": "uniform"}, None),
        (ARCHITECTURES["october"] | {"window_pattern": "SSSL"}, "or window_pattern as in --architecture october"),
        (ARCHITECTURES["october"] | {"vocab_multiple": 64}, "or vocab_multiple as in --architecture october"),
        (ARCHITECTURES["october"] | {"backout": True}, "or backout as in --architecture october"),
    ],
)
def test_models_of_both_architectures_can_be_written_and_no_others(parts, message):
    config = GPTConfig(**SHAPE | ARCHITECTURES["today"] | parts)
    if message is None:
        nanochat_export.check_architecture(config)
    else:
        with pytest.raises(ValueError, match=message):
            nanochat_export.check_architecture(config)


def test_a_model_of_today_is_refused_for_transformers_with_its_parts(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "nanochat", tensors_of(TODAY), base_meta())
    assert import_(source, tmp_path / "run") == 0
    assert export.main(["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    parts = (
        "value_embeddings, residual_scalars, smear, backout, qk_scale, rotary_base, window_multiple, bounded_windows"
    )
    assert f"transformers has nanochat's first architecture only, and this model differs in {parts}" in error
    assert not (tmp_path / "out").exists()
    assert (
        export.main(["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--format", "safetensors"])
        == 0
    )
    stored = json.loads((tmp_path / "out" / "model_config.json").read_text())
    assert GPTConfig(**stored) == load_model(tmp_path / "run")[0].config


def test_an_imported_model_of_today_generates(tmp_path):
    source = write_checkpoint(tmp_path / "nanochat", tensors_of(TODAY), base_meta())
    assert import_(source, tmp_path / "run") == 0
    model, tokenizer, _ = load_model(tmp_path / "run")
    ids = prompt = [tokenizer.bos_id, *tokenizer.encode("the")]
    with torch.inference_mode():
        for _ in range(8):
            ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    greedy = Sampling(8, temperature=0)
    found = [token for piece in complete(model, tokenizer, prompt, greedy) for token in piece.tokens]
    assert found == ids[len(prompt) :]
