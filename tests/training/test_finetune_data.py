"""Fine-tuning on rows of several conversations, on mixtures of files, on records of many forms, from a warm start."""

import hashlib
import json
import os
import shutil
import subprocess

import pytest
import torch
from fork_server import python
from tiny_run import BACKEND, losses, records, train, write_text

from nanochat_native import finetune
from nanochat_native.runs import checkpoint, run_folder
from nanochat_native.runs.config import FinetuneConfig, upgraded
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.console import SilentConsole
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.training import finetuning


def chat(question, *answers):
    """Return a conversation of a turn for each answer."""
    return [
        message
        for answer in answers
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]


def write(path, chats):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_text(folder / "text.jsonl")
    assert train(folder, run="base", steps=4, max_seq_len=256, total_batch_size=512, recipe="today") == 0
    write(folder / "chats.jsonl", [chat(f"count to {n}", "one " * n) for n in (1, 12, 2, 7, 1, 9, 3, 5, 4, 8, 6, 2)])
    return folder


def flags(folder, run="chat", **changes):
    values = {
        "checkpoint": folder / "runs" / "base",
        "data": folder / "chats.jsonl",
        "val_data": folder / "chats.jsonl",
        "cache_dir": folder / "cache",
        "out_dir": folder / "runs",
        "run": run,
        "device": "cpu",
        "backend": BACKEND,
        "max_seq_len": 64,
        "packing": "best-fit",
        "batch_rows": 2,
        "num_iterations": 6,
        "save_every": 3,
        "sample_every": 0,
        "grad_clip": 0,
    }
    args = []
    for name, value in (values | changes).items():
        if value is not None:
            given = [str(each) for each in value] if isinstance(value, tuple) else [] if value is True else [str(value)]
            args += [f"--{name.replace('_', '-')}", *given]
    return args


def run(folder, name, **changes):
    torch.set_num_threads(1)
    return finetune.main(flags(folder, name, **changes))


def config_of(folder, **changes):
    return run_folder.resolve_config(flags(folder, **changes), FinetuneConfig, finetuning.resolve_finetuning)[0]


def trainer_of(folder, **changes):
    return finetuning.make_trainer(config_of(folder, **changes), SilentConsole(), World())


def chats_of(folder, **changes):
    _, tokenizer, _ = load_model(folder / "runs" / "base")
    return finetuning.make_chats(config_of(folder, **changes), tokenizer, tokenizer.vocab_size)


def decoded(folder, rows):
    _, tokenizer, _ = load_model(folder / "runs" / "base")
    return [tokenizer.decode(tokens.tolist()) for tokens, _ in rows.documents]


# --- packing ---


def test_a_step_on_packed_rows_is_a_step_on_rows_of_one_conversation(base):
    """All conversations are in one step: the loss is the mean over the same targets, whatever the rows."""
    found = {}
    for packing, rows in (("one-per-row", 12), ("best-fit", 1000)):
        trainer = trainer_of(base, packing=packing, batch_rows=rows)
        loss, norm = trainer.compute_gradients(trainer.loader.batch(0))
        gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
        validation = trainer.measure(trainer.validation_batches(10**6))
        found[packing] = loss, norm, gradients, validation, trainer
    (loss, norm, gradients, validation, _), (*packed, many) = found.values()
    assert len(many.task._chats.train.rows) < 12
    assert (packed[0], packed[1]) == (pytest.approx(loss, rel=1e-6), pytest.approx(norm, rel=1e-5))
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed[2][name], gradient, atol=2e-6, rtol=1e-4)
    assert packed[3].loss == pytest.approx(validation.loss, rel=1e-6)
    assert packed[3][2:] == validation[2:]
    x, y = many.loader.batch(0)
    with torch.no_grad():
        crossing = many.model(x, y).item()
    assert abs(crossing - loss) > 2e-5, "attention across conversations would show"
    assert many.accumulation_steps == 1


def test_micro_batches_change_no_loss(base):
    found = []
    for rows in (1, 2):
        trainer = trainer_of(base, batch_rows=2, device_batch_size=rows)
        assert trainer.accumulation_steps == 2 // rows
        found.append(trainer.compute_gradients(trainer.loader.batch(0)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_packed_run_resumes_bit_for_bit(base, capsys):
    mix = (f"{base / 'chats.jsonl'}:epochs=1.5",)
    assert run(base, "whole", mix=mix) == 0
    assert "padding" in capsys.readouterr().out
    assert run(base, "cut", mix=mix) == 0
    whole, cut = base / "runs" / "whole", base / "runs" / "cut"
    shutil.rmtree(checkpoint.path_of(cut / "checkpoints", 6))
    assert finetune.main(["--resume", str(cut)]) == 0
    assert losses(cut) == losses(whole)
    tensors = [checkpoint.load(folder / "checkpoints", 6)[0]["model"] for folder in (whole, cut)]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    capsys.readouterr()
    assert finetune.main(["--resume", str(cut), "--packing", "one-per-row"]) == 2
    assert "--packing best-fit -> one-per-row" in capsys.readouterr().err
    assert finetune.main(["--resume", str(cut), "--mix", str(base / "chats.jsonl")]) == 2
    assert "the data or the tokenizer is not what this run began with" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one_process(base):
    changes = {"mix": (f"{base / 'chats.jsonl'}:epochs=2",), "load_optimizer": True}
    assert run(base, "one", **changes) == 0
    command = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["nanochat_native.finetune", "--", *flags(base, "two", **changes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": python()}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    for one, two in zip(losses(base / "runs" / "one"), losses(base / "runs" / "two"), strict=True):
        assert one[:2] == two[:2]
        assert one[2] == pytest.approx(two[2], abs=2e-4)


def test_runs_of_earlier_versions_have_one_conversation_a_row_and_their_hash(base):
    made = chats_of(base, packing=None)
    _, tokenizer, _ = load_model(base / "runs" / "base")
    side = [(tokens.tolist(), mask.tolist()) for tokens, mask in made.train.documents]
    digest = hashlib.sha256(f"{tokenizer.hash} {made.train.sequence_len}".encode())
    digest.update((json.dumps(side).encode() + b"\n") * 2)
    assert made.corpus.hash == digest.hexdigest()
    assert made.train.rows == [[i] for i in range(12)]
    assert chats_of(base).corpus.hash != made.corpus.hash
    assert run(base, "earlier", packing=None, num_iterations=1) == 0
    path = base / "runs" / "earlier" / "config.json"
    content = json.loads(path.read_text())
    for name in ("mix", "cut", "skip_bad_lines", "load_optimizer"):
        del content["config"][name]
    content["config"]["packing"] = "stream"
    path.write_text(json.dumps(content))
    config = run_folder.load_config(path.parent)
    assert (config.packing, config.mix, config.cuts_turns, config.order) == ("one-per-row", (), False, "stream")
    assert finetune.main(["--resume", str(path.parent), "--num-iterations", "2"]) == 0
    assert upgraded({"packing": "stream"})["packing"] == "stream", "of train"


# --- mixtures ---


def test_a_pass_has_each_file_as_often_as_its_epochs_say(base):
    other = write(base / "other.jsonl", [chat(f"other {n}", "word") for n in range(10)])
    for epochs, count in (("", 10), (":epochs=3", 30), (":epochs=0.5", 5), (":epochs=2.25", 22)):
        made = chats_of(base, mix=(f"{other}{epochs}",))
        found = [text for text in decoded(base, made.train) if "other" in text]
        assert len(found) == count
        assert len(made.train.documents) == 12 + count
        assert found == [
            text for text in decoded(base, chats_of(base, mix=(f"{other}{epochs}",)).train) if "other" in text
        ]
        times = {text: found.count(text) for text in found}
        assert max(times.values()) - (min(times.values()) if len(times) == 10 else 0) <= 1
    assert "other.jsonl: 10 conversations, 2.25 times, are 22 of a pass" in made.corpus.notes


def test_a_weight_is_the_number_of_conversations_for_each_one_of_the_first_file(base):
    other = write(base / "other.jsonl", [chat(f"other {n}", "word") for n in range(10)])
    for weight, count in (("1", 12), ("0.25", 3), ("2.5", 30)):
        made = chats_of(base, mix=(f"{other}:weight={weight}",))
        assert sum("other" in text for text in decoded(base, made.train)) == count
        assert len(made.train.documents) == 12 + count
    assert "other.jsonl: 10 conversations, 3 times, are 30 of a pass" in made.corpus.notes
    made = chats_of(base, mix=(finetuning.with_absolute_path("examples:weight=5"),))
    assert "made-up examples: 600 conversations, 0.1 times, are 60 of a pass" in made.corpus.notes


@pytest.mark.parametrize("amount", ["epochs=1e308", "weight=1e9"])
def test_a_pass_without_bound_is_refused(base, capsys, amount):
    other = write(base / "other.jsonl", [chat(f"other {n}", "word") for n in range(10)])
    assert run(base, "bad", mix=(f"{other}:{amount}",)) == 2
    assert "conversations of it, and 1,000,000,000 is the most" in capsys.readouterr().err


def test_held_out_conversations_of_a_mixture_are_validated_once(base):
    other = write(base / "other.jsonl", [chat(f"other {n}", "word") for n in range(60)])
    made = chats_of(base, mix=(f"{other}:epochs=3",), val_data=None)
    trained, held = decoded(base, made.train), decoded(base, made.val)
    assert held
    assert not set(trained) & set(held)
    assert len(held) == len(set(held))
    assert {trained.count(text) for text in trained if "other" in text} == {3}


def test_a_mixture_of_which_nothing_is_held_out_keeps_its_epochs(base, monkeypatch):
    monkeypatch.setattr(finetuning, "is_held_out", lambda chat: False)
    other = write(base / "few.jsonl", [chat(f"few {n}", "word") for n in range(3)])
    made = chats_of(base, mix=(f"{other}:epochs=4",), val_data=None)
    for part, times in ((made.train, 4), (made.val, 1)):
        assert sum("few" in text for text in decoded(base, part)) == 3 * times


def test_the_generated_conversations_can_be_mixed_in(base):
    made = chats_of(base, mix=(finetuning.with_absolute_path("examples:epochs=0.5"),))
    assert "made-up examples: 600 conversations, 0.5 times, are 300 of a pass" in made.corpus.notes
    assert len(made.train.documents) > 12 + 150, "of which some are too long for the rows"


@pytest.mark.parametrize(
    "entry",
    [
        "x:epochs=0",
        "x:epochs=-1",
        "x:epochs=two",
        "x:epochs=inf",
        "x:epochs=nan",
        ":epochs=2",
        "",
        "x:weight=0",
        "x:epochs=2:weight=3",
        "x:epochs=2:b",
    ],
)
def test_a_bad_entry_of_a_mixture_is_refused(base, capsys, entry):
    assert run(base, "bad", mix=(entry,)) == 2
    assert (
        "--mix must be PATH, PATH:epochs=N or PATH:weight=W with a finite number N or W > 0" in capsys.readouterr().err
    )
    assert not (base / "runs" / "bad").exists()


# --- long conversations ---


def test_long_conversations_end_after_the_last_answer_that_fits(base):
    long = chat("a", *["one two three four"] * 12)
    never = [*chat("word " * 90, "not reached"), *chat("b", "c")]
    write(base / "long.jsonl", [long, never, chat("hi", "yes")])
    changes = {"data": base / "long.jsonl", "val_data": base / "chats.jsonl"}
    by_turns, by_tokens = chats_of(base, **changes), chats_of(base, **changes, cut="tokens")
    text = decoded(base, by_turns.train)[0]
    assert text.endswith("one two three four<|assistant_end|>")
    assert 1 < text.count("<|assistant_end|>") < 12
    cut_anywhere = decoded(base, by_tokens.train)[0]
    assert cut_anywhere.startswith(text)
    assert len(by_tokens.train.documents[0][0]) == 65 > len(by_turns.train.documents[0][0])
    assert (
        "2 conversations are cut after the last answer within 64 tokens; 1 with no answer before that are left out"
        in (by_turns.corpus.notes)
    )
    assert len(by_turns.train.documents) == 2
    single = chats_of(base, **changes, packing="one-per-row", cut="turns")
    assert decoded(base, single.train)[0] == text


def test_an_answer_that_fits_exactly_is_kept():
    tokens, mask = list(range(10)), [False, True] * 5
    for length, kept in ((9, 10), (8, 4), (3, 4), (2, 1)):
        found = finetuning.cut_after_answer((tokens, mask), length, 3)
        assert len(found[0]) == len(found[1]) == kept, length


# --- records ---


def test_bad_lines_are_skipped_counted_and_named(base, capsys):
    good = json.dumps(chat("q", "a"))
    path = base / "mixed.jsonl"
    path.write_text("\n".join([good, "{", '{"text": "x"}', good, '[{"role": "user", "content": "x"}]', good]) + "\n")
    assert run(base, "strict", data=path) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}, line 2: not JSON")
    assert run(base, "skipping", data=path, skip_bad_lines=True, batch_rows=1, num_iterations=1) == 0
    out = capsys.readouterr().out
    assert f"skipped: {path}, line 2: not JSON" in out
    assert f"skipped: {path}, line 3: the record has the keys 'text'" in out
    assert f"skipped: {path}, line 5: the last message must be the assistant's" in out
    assert "mixed.jsonl: 3 of 6 records are bad and skipped" in out
    path.write_text("{\n" * 9)
    assert run(base, "nothing", data=path, skip_bad_lines=True) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: no conversation in it, 9 bad records are skipped; the first: ")
    notes = []
    write(base / "good.jsonl", [chat("q", "a")])
    path.write_text("{\n" * 9 + good)
    finetuning.read_conversations(path, notes, skip_bad=True)
    assert len(notes) == finetuning.SHOWN_BAD + 2


def test_calls_of_the_calculator_are_trained_on_as_its_tokens(base):
    call = {"function": {"name": "calculator", "arguments": '{"expression": "2*3"}'}}
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    rest = [{"role": "tool", "content": "6"}, {"role": "assistant", "content": "It is 6."}]
    made = chats_of(base, data=write(base / "tools.jsonl", [asked + rest]))
    (text,) = decoded(base, made.train)
    code = "<|python_start|>2*3<|python_end|><|output_start|>6<|output_end|>"
    assert text.endswith(f"<|assistant_start|>{code}It is 6.<|assistant_end|>")
    ((tokens, is_target),) = made.train.documents
    _, tokenizer, _ = load_model(base / "runs" / "base")
    assert tokenizer.decode(tokens[is_target].tolist()) == "<|python_start|>2*3<|python_end|>It is 6.<|assistant_end|>"
    assert any("with calls of the calculator" in note for note in made.corpus.notes)


def test_parquet_as_it_is_downloaded(base, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    smoltalk = [{"messages": chat("q", "a"), "source": "x"}, {"messages": chat("r", "b", "c"), "source": None}]
    mmlu = [{"question": "Which?", "subject": "s", "choices": ["one", "two"], "answer": 1}]
    gsm8k = [{"question": "q", "answer": "It is <<2*3=6>>6."}]
    for name, rows in (("smoltalk", smoltalk), ("mmlu", mmlu), ("gsm8k", gsm8k)):
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "train-00000-of-00001.parquet")
    mix = (f"{tmp_path / 'mmlu'}", f"{tmp_path / 'gsm8k'}/*.parquet:epochs=2")
    made = chats_of(base, data=tmp_path / "smoltalk", mix=mix, max_seq_len=256)
    assert len(made.train.documents) == 2 + 1 + 2
    texts = decoded(base, made.train)
    assert any("- one=A" in text and text.endswith("<|assistant_start|>B<|assistant_end|>") for text in texts)
    assert sum("<|python_start|>2*3<|python_end|><|output_start|>6<|output_end|>6." in text for text in texts) == 2
    notes = "\n".join(made.corpus.notes)
    assert "smoltalk: 2 of 2 records are messages, a list of role and content" in notes
    assert "mmlu: 1 of 1 records are question, choices and answer, as in MMLU" in notes
    assert "question and answer with calculations, as in GSM8K" in notes
    rows = [*smoltalk, {"messages": chat("r", "b")[:1], "source": "y"}]
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(ValueError, match=r"bad.parquet, row 3: the last message must be the assistant's"):
        finetuning.read_conversations(path)


# --- the optimizers ---


def test_the_optimizers_begin_with_the_state_of_the_base(base):
    tensors, meta = checkpoint.load(base / "runs" / "base" / "checkpoints", 4)
    trainer = trainer_of(base, load_optimizer=True)
    state, scalars = checkpoint.flatten_optimizers(trainer.model.named_parameters(), trainer.optimizers)
    assert state.keys() == tensors["optimizer"].keys()
    assert all(torch.equal(value, tensors["optimizer"][name]) for name, value in state.items())
    assert scalars == meta["optimizer"]
    assert not any(optimizer.state for optimizer in trainer_of(base).optimizers)


def test_a_warm_start_changes_the_run_and_is_resumed_exactly(base):
    for name, warm in (("cold", None), ("warm", True), ("warm-cut", True)):
        assert run(base, name, load_optimizer=warm) == 0
    folders = [base / "runs" / name for name in ("cold", "warm", "warm-cut")]
    cold, warm, _ = map(losses, folders)
    assert cold[0] == warm[0]
    assert cold[1] != warm[1]
    shutil.rmtree(checkpoint.path_of(folders[2] / "checkpoints", 6))
    hidden = base / "runs" / "base"
    hidden.rename(base / "hidden")
    try:
        assert finetune.main(["--resume", str(folders[2])]) == 0
    finally:
        (base / "hidden").rename(hidden)
    assert losses(folders[2]) == warm
    assert len(records(folders[2], "train")) == 6


def test_a_base_without_the_state_of_these_optimizers_is_refused(base):
    with pytest.raises(ConfigError, match="--load-optimizer needs the base's --optimizer hybrid, got adamw"):
        trainer_of(base, load_optimizer=True, optimizer="adamw")
    imported = base / "imported"
    shutil.copytree(base / "runs" / "base", imported)
    tensors, meta = checkpoint.load(imported / "checkpoints", 4)
    checkpoint.save(imported / "checkpoints", 5, {"model": tensors["model"]}, {**meta, "imported": True})
    with pytest.raises(ConfigError, match=r"--load-optimizer needs .* was imported"):
        trainer_of(base, load_optimizer=True, checkpoint=imported)
