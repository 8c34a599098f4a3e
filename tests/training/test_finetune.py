"""Fine-tuning: targets and their weights, resumed runs, answers that change, errors in one line."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from fork_server import python
from tiny_run import BACKEND, assert_refused, losses, records, train, write_text

from nanochat_native import evaluate, finetune
from nanochat_native.data import ConversationRows, conversations
from nanochat_native.data.example_chats import example_chats
from nanochat_native.inference.engine import Engine
from nanochat_native.inference.sampling import Sampling
from nanochat_native.runs import checkpoint, run_folder
from nanochat_native.runs.config import FinetuneConfig
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.console import SilentConsole
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.train import main as train_main
from nanochat_native.training import finetuning

QUESTIONS = {
    "who are you?": "a tensor.",
    "what feeds a layer?": "the matrix",
    "say nothing": "",
    "count": "one two three",
}


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_chats(path, copies=4):
    lines = [json.dumps({"messages": chat(q, a)}) for _ in range(copies) for q, a in QUESTIONS.items()]
    path.write_text("\n".join(lines) + "\n\n")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_text(folder / "text.jsonl")
    assert train(folder, run="base", steps=4, max_seq_len=64) == 0
    write_chats(folder / "chats.jsonl")
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
        "num_iterations": 6,
        "save_every": 3,
        "sample_every": 0,
        "rate_scale": 0.5,
    }
    values |= changes
    args = []
    for name, value in values.items():
        if value is not None:
            args += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return args


def run(folder, name="chat", **changes):
    torch.set_num_threads(1)
    return finetune.main(flags(folder, name, **changes))


def config_of(folder, **changes):
    return run_folder.resolve_config(flags(folder, **changes), FinetuneConfig, finetuning.resolve_finetuning)[0]


def answer(run_dir, question, tokens=12):
    model, tokenizer, meta = load_model(run_dir)
    engine = Engine(model, tokenizer, slots=1)
    prompt = conversations.prompt_of(tokenizer, [chat(question, "")[0]], chat_trained=True)
    stops = conversations.stop_tokens(tokenizer)
    (request,) = engine.generate([(prompt, Sampling(tokens, temperature=0, stop_tokens=stops))])
    return request.text, meta


# --- what is trained on ---


def test_each_row_holds_a_conversation_whose_answers_are_the_targets():
    rows = ConversationRows([([1, 2, 3, 4, 5], [False, False, True, True, False]), ([7, 8], [False, True])], 6)
    inputs, targets = rows.pair(0, 6)
    assert inputs.tolist() == [1, 2, 3, 4, 0, 0]
    assert targets.tolist() == [-1, 3, 4, -1, -1, -1]
    assert [part.tolist() for part in rows.pair(6, 6)] == [[7, 0, 0, 0, 0, 0], [8, -1, -1, -1, -1, -1]]
    assert (rows.num_targets, rows.num_windows(6), len(list(rows.windows(6)))) == (3, 2, 2)
    assert [part.tolist() for part in next(rows.windows(6, 1, 5))] == [part.tolist() for part in rows.pair(6, 6)]
    assert [part.tolist() for part in ConversationRows([([1, 2, 3, 4, 5], [True] * 5)], 2).pair(0, 2)] == [
        [1, 2],
        [2, 3],
    ]
    with pytest.raises(ValueError, match="a row of 6 tokens, got 6"):
        rows.pair(3, 6)


def gradients(folder, **changes):
    trainer = finetuning.make_trainer(config_of(folder, **changes), SilentConsole(), World())
    loss, _ = trainer.compute_gradients(trainer.loader.batch(0))
    return trainer, loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def test_the_loss_is_the_mean_over_the_targets_for_each_micro_batch_size(base):
    (base / "uneven.jsonl").write_text(
        "".join(json.dumps(chat("count", "one " * n)) + "\n" for n in (1, 12, 2, 7, 1, 9, 3, 1))
    )
    changes = {"data": base / "uneven.jsonl", "val_data": base / "uneven.jsonl", "batch_rows": 8, "grad_clip": 0}
    trainer, whole_loss, whole = gradients(base, **changes, device_batch_size=8)
    x, y = trainer.loader.batch(0)
    with torch.no_grad():
        each = trainer.model(x, y, reduction="none")
    assert whole_loss == pytest.approx((each.sum() / (y != -1).sum()).item(), rel=1e-6)
    row_means = [row[t != -1].mean() for row, t in zip(each, y, strict=True)]
    assert abs(whole_loss - torch.stack(row_means).mean().item()) > 1e-3, "a mean of means would not show"
    for rows in (1, 2, 4):
        trainer, loss, found = gradients(base, **changes, device_batch_size=rows)
        assert trainer.accumulation_steps == 8 // rows
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, whole[name], atol=1e-6, rtol=1e-4)


def test_answers_change(base):
    before = {question: answer(base / "runs" / "base", question)[0] for question in QUESTIONS}
    assert run(base, "answers", num_iterations=60, batch_rows=8, rate_scale=1.0) == 0
    for question, expected in QUESTIONS.items():
        found, meta = answer(base / "runs" / "answers", question)
        assert found == expected != before[question]
    assert conversations.is_chat_trained(meta)
    assert meta["base"]["run"] == str(base / "runs" / "base")
    assert meta["base"]["step"] == 4
    loss = [r["loss"] for r in records(base / "runs" / "answers", "val")]
    assert loss[-1] < 0.05 < 1 < loss[0]
    assert not conversations.is_chat_trained(load_model(base / "runs" / "base")[2])


# --- runs ---


def test_a_run_resumes_bit_for_bit_also_without_its_base(base):
    assert run(base, "whole") == 0
    assert run(base, "cut") == 0
    whole, cut = base / "runs" / "whole", base / "runs" / "cut"
    shutil.rmtree(checkpoint.path_of(cut / "checkpoints", 6))
    hidden = base / "runs" / "base"
    hidden.rename(base / "hidden")
    try:
        assert finetune.main(["--resume", str(cut)]) == 0
    finally:
        (base / "hidden").rename(hidden)
    assert losses(cut) == losses(whole)
    tensors = [checkpoint.load(folder / "checkpoints", 6) for folder in (whole, cut)]
    for name, tensor in tensors[0][0]["model"].items():
        assert torch.equal(tensor, tensors[1][0]["model"][name]), name
    assert tensors[0][1]["base"] == tensors[1][1]["base"]


def test_the_base_is_loaded_once(base, monkeypatch):
    loaded = []

    def load_file(path, real=checkpoint.load_file):
        loaded.append(path)
        return real(path)

    monkeypatch.setattr(checkpoint, "load_file", load_file)
    assert run(base, "once", num_iterations=1) == 0
    folder = checkpoint.path_of(base / "runs" / "base" / "checkpoints", 4)
    assert sorted(loaded) == [folder / "model.safetensors", folder / "optimizer.safetensors"]


def test_a_damaged_base_gives_way_to_the_checkpoint_before(base):
    damaged = base / "damaged"
    shutil.copytree(base / "runs" / "base", damaged)
    tensors, meta = checkpoint.load(damaged / "checkpoints", 4)
    weights = checkpoint.save(damaged / "checkpoints", 5, tensors, meta) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert run(base, "of_damaged", checkpoint=damaged, num_iterations=1) == 0
    assert run_folder.load_config(base / "runs" / "of_damaged").step == 4
    assert load_model(base / "runs" / "of_damaged")[2]["base"]["step"] == 4


def test_other_commands_take_the_run(base, capsys):
    assert run(base, "taken") == 0
    folder = base / "runs" / "taken"
    assert run_folder.load_config(folder).rate_scale == 0.5
    capsys.readouterr()
    assert train_main(["--resume", str(folder)]) == 2
    assert "was created by nanochat_native.finetune" in capsys.readouterr().err
    assert finetune.main(["--resume", str(base / "runs" / "base")]) == 2
    assert "was created by nanochat_native.train" in capsys.readouterr().err
    assert evaluate.main(["--checkpoint", str(folder)]) == 2
    assert "was fine-tuned on conversations; set --data to a text" in capsys.readouterr().err
    assert evaluate.main(["--checkpoint", str(folder), "--data", str(base / "text.jsonl")]) == 0
    assert run(base, "again", checkpoint=folder) == 0, "a fine-tuned model is fine-tuned again"


def test_an_imported_model_can_be_fine_tuned(base):
    folder = base / "runs" / "base"
    tensors, meta = checkpoint.load(folder / "checkpoints", 4)
    imported = base / "imported"
    shutil.copytree(folder, imported)
    checkpoint.save(imported / "checkpoints", 5, {"model": tensors["model"]}, {**meta, "imported": True})
    assert run(base, "of_imported", checkpoint=imported) == 0
    assert load_model(base / "runs" / "of_imported")[2]["base"]["imported"] is True


def test_the_examples_are_the_same_each_time_and_serve_without_data(base):
    assert example_chats() == example_chats()
    for messages in example_chats():
        conversations.check_messages(messages)
    assert run(base, "examples", data=None, val_data=None, num_iterations=2) == 0
    folder = base / "runs" / "examples"
    assert run_folder.load_config(folder).data == "examples"
    assert len(records(folder, "sample")) == 1
    assert "<|user_start|>" in records(folder, "sample")[0]["prompt"]


def test_few_conversations_are_their_own_validation_and_long_ones_are_cut(base, capsys):
    chats = [chat("count", "one two three " * 40), chat("word " * 90, "never reached"), chat("hi", "yes")]
    (base / "few.jsonl").write_text("".join(json.dumps(messages) + "\n" for messages in chats))
    assert run(base, "few", data=base / "few.jsonl", val_data=None, num_iterations=1) == 0
    out = capsys.readouterr().out
    assert "too few conversations with answers (2) to hold some out" in out
    assert "2 conversations are cut after 64 tokens; 1 with no answer before that are left out" in out


@pytest.mark.slow
def test_ranks_have_the_losses_of_one_process(base):
    assert run(base, "one", batch_rows=8) == 0
    command = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["nanochat_native.finetune", "--", *flags(base, "two", batch_rows=8)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": python()}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    for one, two in zip(losses(base / "runs" / "one"), losses(base / "runs" / "two"), strict=True):
        assert one[:2] == two[:2]
        assert one[2] == pytest.approx(two[2], abs=2e-4)


# --- errors ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"messages": [', "line 2: "),
        ("3", "line 2: the record must be an object or a list; it must have messages"),
        ('{"message": []}', "line 2: the record has the keys 'message'; it must have messages"),
        ('{"messages": []}', "line 2: messages must be a list with at least one"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "line 2: messages must have a message of the user"),
        ('{"conversations": [{"from": "gpt", "value": "x"}]}', "line 2: messages[0].role must be 'user'"),
        ('{"conversations": [{"from": "narrator", "value": "x"}]}', "line 2: messages[0].role must be one of"),
        (
            '[{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]',
            "line 2: messages[1].role must",
        ),
        (
            '[{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]',
            "line 2: messages[1] is of a tool, and no call of the calculator precedes it",
        ),
        (
            '[{"role": "user", "content": "x"}, {"role": "assistant", "content": null}]',
            "line 2: messages[1].content must be",
        ),
        ('[{"role": "user"}, {"role": "assistant", "content": "x"}]', "line 2: messages[0] must have role and content"),
        ('[{"from": "human"}, {"from": "gpt", "value": "x"}]', "line 2: messages[0] must have role and content"),
        (
            '[{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]',
            "line 2: messages[0].content must",
        ),
        ('["hello", "hi"]', "line 2: messages[0] must be an object"),
        ('[{"role": ["user"], "content": "x"}]', "line 2: messages[0].role must be"),
        ('[{"role": "user", "content": "x"}]', "line 2: the last message must be the assistant's, got the user's"),
        ('[{"role": "assistant", "content": "x"}]', "line 2: messages[0].role must be 'user'"),
        ("[" * 5000, "line 2: "),
    ],
)
def test_a_line_that_is_no_conversation_is_named(base, capsys, content, message):
    path = base / "wrong.jsonl"
    path.write_text(json.dumps(chat("a", "b")) + "\n" + content + "\n")
    assert run(base, "wrong", data=path) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}, {message}")
    assert error.count("\n") == 1
    assert not (base / "runs" / "wrong").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": None}, "--checkpoint RUN is needed"),
        ({"checkpoint": "/nowhere"}, "no such run folder"),
        ({"step": 77}, "holds no checkpoint of step 77, but of 4"),
        ({"data": "/nowhere.jsonl"}, "/nowhere.jsonl: no file, no folder with files and no glob that matches"),
        ({"val_data": "/nowhere.jsonl"}, "/nowhere.jsonl: no file, no folder with files and no glob that matches"),
        ({"val_data": ""}, "--val-data must be a file, a folder or a glob, got ''"),
        ({"depth": 3}, "--depth follows from the base model"),
        ({"vocab_size": 400}, "--vocab-size follows from the base model"),
        ({"total_batch_size": 64}, "--total-batch-size is a flag of pretraining; fine-tuning has --batch-rows"),
        ({"max_seq_len": 65}, "--max-seq-len must be <= 64, the base model's, got 65"),
        ({"epochs": 0}, "--epochs must be a finite number > 0, got 0.0"),
        ({"rate_scale": -1}, "--rate-scale must be a finite number > 0, got -1.0"),
        ({"batch_rows": 0}, "--batch-rows must be a whole number >= 1, got 0"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(base, capsys, changes, message):
    assert_refused(capsys, base / "runs" / "mistake", run(base, "mistake", **changes), message)


def test_a_run_keeps_its_data(base, capsys):
    path = write_chats(base / "changing.jsonl")
    assert run(base, "changing", data=path, val_data=path) == 0
    path.write_text(json.dumps(chat("other", "words")) + "\n")
    assert finetune.main(["--resume", str(base / "runs" / "changing"), "--num-iterations", "9"]) == 2
    assert "not what this run began with" in capsys.readouterr().err
    other = base / "other-words.jsonl"
    other.write_text(json.dumps(chat("other", "words")) + "\n")
    assert finetune.main([*flags(base, "changing", data=other), "--resume", "auto"]) == 2
    assert "--data" in capsys.readouterr().err


def test_files_that_are_no_text_or_empty_are_refused(tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "latin").write_bytes(b'[{"role": "user", "content": "\xe9"}]')
    with pytest.raises(ValueError, match="empty: no conversation in it"):
        finetuning.read_conversations(tmp_path / "empty")
    with pytest.raises(ValueError, match="latin, line 1: not UTF-8"):
        finetuning.read_conversations(tmp_path / "latin")


# --- conversations of other files ---


def chats_of(base, records, name="made.jsonl", **changes):
    """Return (chats, notes) of make_chats for a file of records."""
    (base / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    config = config_of(base, data=base / name, **changes)
    _, tokenizer, _ = load_model(base / "runs" / "base")
    made = finetuning.make_chats(config, tokenizer, tokenizer.vocab_size)
    return made, made.corpus.notes


def documents(rows):
    return [(tokens.tolist(), learnt.tolist()) for tokens, learnt in rows.documents]


def test_a_file_may_hold_several_forms_and_the_notes_name_them(base):
    plain, _ = chats_of(base, [chat("q", "a")] * 3, val_data=None)
    records = [
        {"messages": chat("q", "a")},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "completion": "a"},
    ]
    mixed, notes = chats_of(base, records, val_data=None)
    assert documents(mixed.train) == documents(plain.train)
    assert mixed.corpus.hash == plain.corpus.hash
    assert "made.jsonl: 1 of 3 records are conversations, a list of messages" in notes
    assert "made.jsonl: 1 of 3 records are prompt and completion, a question, and its answer" in notes
    assert "made.jsonl: 1 of 3 records are messages, a list of role and content" in notes
    assert len(notes) == 4, "three forms, and too few to hold some out"


def test_an_error_after_many_good_records_names_its_line(base):
    with pytest.raises(ValueError, match=r"made.jsonl, line 51: the record has the keys 'text'; it must have messages"):
        chats_of(base, [chat("q", "a")] * 50 + [{"text": "x"}])


def test_conversations_of_a_folder_are_those_of_its_files(base, capsys):
    folder = base / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps(chat("q", "a")) + "\n")
    (folder / "b.json").write_text(json.dumps([{"instruction": "r", "output": "b"}]))
    (folder / "LICENSE").write_text("words")
    notes = []
    assert finetuning.read_conversations(folder, notes) == [chat("q", "a"), chat("r", "b")]
    assert notes[0] == f"not read, because not JSON: 1 of 3 files (first: {folder / 'LICENSE'})"
    assert finetuning.read_conversations(f"{folder}/*.jsonl") == [chat("q", "a")]
    assert run(base, "of_a_folder", data=folder, val_data=f"{folder}/*.jsonl", num_iterations=1) == 0
    out = capsys.readouterr().out
    assert "note     1 of 1 conversations of --val-data are in --data or --mix too" in out


def test_special_tokens_in_data_are_text(base):
    made, _ = chats_of(base, [chat("<|assistant_start|>", "<|bos|><|user_end|>")], val_data=None)
    _, tokenizer, _ = load_model(base / "runs" / "base")
    ((tokens, _),) = documents(made.train)
    names = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"]
    assert [t for t in tokens if t >= tokenizer.bos_id] == [tokenizer.special_tokens[name] for name in names]


def test_equal_conversations_are_on_one_side_whatever_else_their_messages_have(base):
    records = []
    for number in range(40):
        for copy in range(3):
            records.append([message | {"id": f"{number}-{copy}"} for message in chat(f"q {number}", f"a {number}")])
    made, notes = chats_of(base, records, val_data=None)
    train, val = ({tuple(tokens) for tokens, _ in documents(rows)} for rows in (made.train, made.val))
    assert notes == ("made.jsonl: 120 of 120 records are messages, a list of role and content",)
    assert len(train) + len(val) == 40
    assert val
    assert not train & val


def held_out_questions(count, held):
    """Return a function from an answer to `count` questions whose conversations with it are held out, or not."""
    return lambda answer: [q for q in map(str, range(1000)) if finetuning.is_held_out(chat(q, answer)) == held][:count]


def test_held_out_answers_that_are_all_empty_are_replaced_by_all(base):
    records = [chat(q, "word") for q in held_out_questions(9, False)("word")]
    records += [chat(q, "") for q in held_out_questions(2, True)("")]
    made, notes = chats_of(base, records, val_data=None)
    assert "too few conversations with answers (11) to hold some out: validation uses all" in notes
    assert documents(made.val) == documents(made.train)
    assert len(made.train.documents) == 11
    records[9:] = [chat(q, "word") for q in held_out_questions(2, True)("word")]
    made, notes = chats_of(base, records, val_data=None)
    assert (len(made.train.documents), len(made.val.documents), len(notes)) == (9, 2, 1)


def test_answers_that_are_all_empty_are_refused_before_any_work(base, capsys):
    empty = base / "all_empty.jsonl"
    empty.write_text("".join(json.dumps(chat(str(i), "")) + "\n" for i in range(40)))
    for changes in ({"data": empty, "val_data": None}, {"data": empty}, {"val_data": empty}):
        assert run(base, "empty", **changes) == 2
        assert (
            capsys.readouterr().err
            == f"error: {empty}: every answer is empty: there is nothing to train on or to validate on\n"
        )
        assert not (base / "runs" / "empty").exists()
    late = base / "late.jsonl"
    late.write_text("".join(json.dumps(chat(str(i), "" if i < 8 else "word")) + "\n" for i in range(9)))
    made, _ = chats_of(base, [chat("q", "a")], val_data=late)
    tokens = 8 * made.val.sequence_len
    assert run(base, "empty", data=base / "made.jsonl", val_data=late, eval_tokens=tokens) == 2
    advice = f"use an --eval-tokens above {tokens}"
    assert f"{late}: the first answers for validation are all empty; {advice}" in capsys.readouterr().err
    assert not (base / "runs" / "empty").exists()
    changes = {"data": base / "made.jsonl", "val_data": late, "eval_tokens": tokens + 1, "num_iterations": 1}
    assert run(base, "late", **changes) == 0


def test_one_conversation_is_enough(base, capsys):
    (base / "one.jsonl").write_text(json.dumps(chat("q", "a")))
    assert run(base, "of_one", data=base / "one.jsonl", val_data=None, num_iterations=2) == 0
    assert "too few conversations with answers (1) to hold some out" in capsys.readouterr().out


def test_answers_beyond_the_cut_are_refused_by_file(base, capsys):
    path = base / "long.jsonl"
    path.write_text(json.dumps(chat("word " * 90, "never reached")) + "\n")
    for changes in ({"data": path, "val_data": None}, {"val_data": path}):
        assert run(base, "long", **changes) == 2
        expected = f"error: {path}: no answer begins within 64 tokens; use a longer --max-seq-len\n"
        assert capsys.readouterr().err == expected


def test_defaults_follow_the_base(base):
    config = config_of(base, run=None, num_iterations=None, rate_scale=0.1)
    assert (config.run, config.depth, config.vocab_size, config.batch_rows) == ("base-chat", 2, 300, 8)
    assert config.matrix_lr == pytest.approx(0.002)
    assert config_of(base, matrix_lr=0.5).matrix_lr == 0.5
    assert finetuning.steps_of(config, 16, 8) == 6
    with pytest.raises(ConfigError, match="--checkpoint RUN is needed"):
        finetuning.resolve_finetuning(FinetuneConfig())


def test_a_base_that_has_moved_is_recognised_by_its_weights(base, capsys):
    """Find the base by its weights, and the conversations by their content."""
    assert run(base, "kept") == 0
    kept = base / "runs" / "kept"
    shutil.rmtree(checkpoint.path_of(kept / "checkpoints", 6))
    moved = base / "moved"
    shutil.copytree(base / "runs" / "base", moved)
    shutil.copy(base / "chats.jsonl", base / "renamed.jsonl")
    paths = ["--checkpoint", str(moved), "--data", str(base / "renamed.jsonl")]
    assert finetune.main(["--resume", str(kept), *paths]) == 0
    assert checkpoint.load(kept / "checkpoints")[1]["base"]["run"] == str(moved)
    assert run_folder.load_config(kept).data == str(base / "renamed.jsonl")
    assert train(base, run="other-base", steps=4, max_seq_len=64, seed=1) == 0
    capsys.readouterr()
    for other, message in (("runs/other-base", "must be the model that this run began with"), ("nowhere", "missing")):
        assert finetune.main(["--resume", str(kept), "--checkpoint", str(base / other)]) == 2
        assert message in capsys.readouterr().err


def test_a_sample_that_fails_does_not_end_fine_tuning(base, monkeypatch, capsys):
    class Broken:
        def __init__(self, *args, **kwargs):
            raise RuntimeError("no engine")

    monkeypatch.setattr(finetuning, "Engine", Broken)
    assert run(base, "unsampled") == 3
    assert capsys.readouterr().out.count("warning: sample failed (RuntimeError: no engine)") == 1
    assert checkpoint.latest(base / "runs" / "unsampled" / "checkpoints") == 6
