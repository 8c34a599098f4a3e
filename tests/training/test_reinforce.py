"""Training by rewards: the gradient, what is trained on, exact resume, ranks, task files and their faults."""

import json
import math
import os
import re
import shutil
import signal
import subprocess

import pytest
import torch
from fork_server import python
from tiny_run import BACKEND, assert_refused, records, train, wait_until, write_text

from nanochat_native import evaluate, finetune, reinforce
from nanochat_native.data import conversations
from nanochat_native.evaluation.chat_tasks import read_task
from nanochat_native.inference import engine
from nanochat_native.inference.calculator import calculate
from nanochat_native.model.decoder import Decoder
from nanochat_native.ops import weight_copies
from nanochat_native.runs import checkpoint, run_folder
from nanochat_native.runs.config import ReinforceConfig
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.console import SilentConsole
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.training import reward_tasks, rollouts
from nanochat_native.training.reinforcement import ExampleLoader, make_trainer, resolve_reinforcement

TASK = """
def examples(split):
    words = ("tensor", "kernel", "matrix", "layer") if split == "train" else ("token", "gradient")
    return [{"messages": [{"role": "user", "content": f"say {word}"}], "word": word} for word in words]

def reward(example, answer):
    return answer.count("e") / (1 + len(answer))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_text(folder / "text.jsonl")
    assert train(folder, run="base", steps=4, max_seq_len=64) == 0
    chats = [
        [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": f"the {word}."}]
        for word in ("tensor", "kernel", "matrix", "layer", "token", "gradient")
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (folder / "task.py").write_text(TASK)
    flags = ["--checkpoint", folder / "runs" / "base", "--data", folder / "chats.jsonl", "--out-dir", folder / "runs"]
    flags += ["--run", "sft", "--device", "cpu", "--backend", BACKEND, "--num-iterations", "12", "--rate-scale", "1"]
    flags += ["--cache-dir", folder / "cache"]
    assert finetune.main([str(part) for part in flags]) == 0
    return folder


def flags(folder, run="rl", **changes):
    values = {
        "checkpoint": folder / "runs" / "sft",
        "task": folder / "task.py",
        "out_dir": folder / "runs",
        "cache_dir": folder / "cache",
        "run": run,
        "device": "cpu",
        "backend": BACKEND,
        "num_iterations": 4,
        "examples_per_step": 2,
        "num_samples": 4,
        "mean_rows": 2,
        "max_new_tokens": 8,
        "eval_every": 2,
        "eval_samples": 2,
        "save_every": 2,
        "sample_every": 0,
        "rate_scale": 0.5,
    }
    values |= changes
    return [
        str(part)
        for name, value in values.items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", *([] if value is True else [value]))
    ]


def run(folder, name="rl", **changes):
    torch.set_num_threads(1)
    return reinforce.main(flags(folder, name, **changes))


def trainer_of(folder, **changes):
    torch.set_num_threads(1)
    config, _ = run_folder.resolve_config(flags(folder, **changes), ReinforceConfig, resolve_reinforcement)
    return make_trainer(config, SilentConsole(), World())


def outcome(run_dir):
    """The rewards and losses of a run, and its last weights and moments."""
    logged = [
        (kind, r["step"], r.get("loss"), r["reward"]) for kind in ("train", "val") for r in records(run_dir, kind)
    ]
    tensors, _ = checkpoint.load(run_dir / "checkpoints")
    return logged, {f"{part}/{name}": t for part in ("model", "optimizer") for name, t in tensors[part].items()}


def assert_same_bits(first, second):
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    for name, tensor in first[1].items():
        assert torch.equal(tensor, second[1][name]), name


# --- the gradient ---


def reference_loss(model, examples, rows_of_a_mean):
    """nanochat's loss in plain torch, from [(tokens, is_drawn, reward), ...] of each example: no padding, no batch."""
    total = torch.zeros((), dtype=torch.float64)
    for answers in examples:
        mean = sum(reward for _, _, reward in answers) / len(answers)
        groups = [answers[i : i + rows_of_a_mean] for i in range(0, len(answers), rows_of_a_mean)]
        for group in groups:
            objective, count = torch.zeros((), dtype=torch.float64), 0
            for tokens, is_drawn, reward in group:
                logits = model(torch.tensor([tokens[:-1]]))[0].double()
                logp = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
                mask = torch.tensor(is_drawn[1:])
                objective = objective + (logp * mask).sum() * (reward - mean)
                count += int(mask.sum())
            total = total - objective / (count * len(groups) * len(examples))
    return total


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_gradient_is_that_of_the_formula_for_each_size_of_a_pass(base, rows):
    trainer = trainer_of(base, device_batch_size=8)
    trainer.config = trainer.config.__class__(**{**vars(trainer.config), "device_batch_size": rows})
    generator = torch.Generator().manual_seed(3)

    def answer():
        length, prompt = int(torch.randint(6, 14, (), generator=generator)), 4
        tokens = torch.randint(0, 256, (length,), generator=generator).tolist()
        is_drawn = [False] * prompt + [True] * (length - prompt)
        is_drawn[5] = False  # a token of the calculator
        reward = float(torch.randint(0, 3, (), generator=generator))
        return rollouts.Rollout(tokens, is_drawn, "", True, reward)

    answers = [answer() for _ in range(8)]
    trainer.roll_out = lambda batch: answers
    loss, norm = trainer.compute_gradients(trainer.loader.batch(0))
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.zero_grad()
    each = [(one.tokens, one.is_drawn, one.reward) for one in answers]
    expected = reference_loss(trainer.model, [each[:4], each[4:]], rows_of_a_mean=2)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert norm > 1e-3
    for name, p in trainer.model.named_parameters():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(found[name], p.grad, atol=2e-5 * scale + 1e-9, rtol=1e-3, msg=name)


def test_equal_rewards_give_a_gradient_of_zero(base):
    trainer = trainer_of(base)
    answers = [rollouts.Rollout([1, 2, 3, 4], [False, False, True, True], "", True, 0.1)] * 8
    trainer.roll_out = lambda batch: answers
    assert trainer.compute_gradients(trainer.loader.batch(0)) == (0.0, 0.0)
    assert all((p.grad == 0).all() for p in trainer.model.parameters())


def test_row_weights_are_checked(base):
    model = trainer_of(base).model
    idx = torch.ones(2, 3, dtype=torch.int64)
    for arguments in ({"row_weights": [1.0]}, {"row_weights": [1.0, 2.0], "reduction": "mean"}):
        with pytest.raises(ValueError, match="row_weights must have 2 numbers"):
            model(idx, idx, **({"reduction": "sum"} | arguments))


# --- answers ---


def test_answers_are_those_of_the_trainer_s_weights_and_of_their_seeds(base):
    trainer = trainer_of(base)
    first, again = (trainer.roll_out(trainer.loader.batch(0)) for _ in range(2))
    assert first == again
    assert len({tuple(answer.tokens) for answer in first[:4]}) > 1, "answers to one example have seeds of their own"
    step, examples = trainer.loader.batch(0)
    assert trainer.roll_out((step + 1, examples)) != first
    assert trainer_of(base, seed=1).roll_out((step, examples)) != first
    for answer in first:
        prompt = len(answer.tokens) - answer.num_drawn
        assert answer.is_drawn == [False] * prompt + [True] * answer.num_drawn
        ends = (*conversations.stop_tokens(trainer.task.tokenizer), trainer.task.tokenizer.bos_id)
        assert (answer.tokens[-1] in ends) == answer.ended
        assert answer.ended or answer.num_drawn == 8
        assert answer.reward == answer.text.count("e") / (1 + len(answer.text))
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    assert trainer.roll_out(trainer.loader.batch(0)) != first


def test_the_decoder_of_a_model_in_training_copies_no_matrix(base):
    model = trainer_of(base).model
    decoder = Decoder(model, 1, 8)
    assert decoder._forward.keywords["blocks"][0].data_ptr() == model.blocks[0].attn.c_q.weight.data_ptr()
    weight_copies.keep(model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        decoder = Decoder(model, 1, 8)
        kept = weight_copies.low_precision(model.blocks[0].attn.c_q.weight, torch.bfloat16)
    assert decoder._forward.keywords["blocks"][0].data_ptr() == kept.data_ptr()


def test_the_results_of_the_calculator_are_not_trained_on(base, monkeypatch):
    trainer = trainer_of(base, max_new_tokens=16)
    tokenizer = trainer.task.tokenizer
    start, end = conversations.special_ids(tokenizer, ["<|python_start|>", "<|python_end|>"])
    (stop,) = conversations.special_ids(tokenizer, ["<|assistant_end|>"])
    code, given = [start, *tokenizer.encode("3*4"), end], len(tokenizer.encode("12")) + 2
    wanted = [*code, stop]
    monkeypatch.setattr(engine.Request, "_draw", lambda self, logits: wanted[sum(self.drawn)])
    answer = trainer.roll_out(trainer.loader.batch(0))[0]
    assert (answer.text, answer.ended) == ("<<3*4=12>>", True)
    (only,) = rollouts.passes([answer], [1.0], 4, torch.device("cpu"))
    prompt = len(trainer.task.train[0][1])
    assert only.targets[0].tolist() == [*[-1] * (prompt - 1), *code, *[-1] * given, stop]


def test_the_examples_of_a_step_are_divided_over_the_ranks():
    whole = ExampleLoader(5, examples_per_step=4, num_samples=2, rank=0, world_size=1)
    parts = [ExampleLoader(5, examples_per_step=4, num_samples=2, rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(4):
        assert whole.batch(step)[1].tolist() == [(4 * step + i) % 5 for i in range(4)]
        assert torch.cat([part.batch(step)[1] for part in parts]).equal(whole.batch(step)[1])
    with whole.iterate(2) as batches:
        assert [batch[0].item() for batch, _ in zip(batches, range(2), strict=False)] == [2, 3]


def test_pass_at_k_is_the_chance_of_a_choice_of_k():
    assert rollouts.pass_at(1, 8, 2) == pytest.approx(0.25)
    assert rollouts.pass_at(2, 4, 2) == pytest.approx(1 - 1 / 6)
    assert rollouts.pass_at(8, 8, 1) == 1
    assert rollouts.pass_at(4, 8, 0) == 0


# --- runs ---


def test_a_run_resumes_bit_for_bit_and_a_seed_repeats(base):
    assert run(base, "whole") == 0
    assert run(base, "again") == 0
    assert run(base, "cut") == 0
    whole, cut = base / "runs" / "whole", base / "runs" / "cut"
    shutil.rmtree(checkpoint.path_of(cut / "checkpoints", 4))
    assert reinforce.main(["--resume", str(cut)]) == 0
    assert_same_bits(outcome(whole), outcome(base / "runs" / "again"))
    assert_same_bits(outcome(whole), outcome(cut))
    assert run(base, "other", seed=1) == 0
    assert outcome(base / "runs" / "other")[0] != outcome(whole)[0]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_a_run_that_is_stopped_by_a_signal_resumes_with_the_same_bits(base, sent):
    changes = {"num_iterations": 40, "save_every": 1}
    assert run(base, "unstopped", **changes, overwrite=True) == 0
    command = [python(), "-m", "nanochat_native.reinforce", *flags(base, f"stopped-{sent}", **changes)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    folder = base / "runs" / f"stopped-{sent}"
    wait_until(lambda: checkpoint.steps(folder / "checkpoints"))
    process.send_signal(sent)
    assert process.wait(300) == (143 if sent == signal.SIGTERM else -signal.SIGKILL)
    assert max(checkpoint.steps(folder / "checkpoints")) < 40
    assert reinforce.main(["--resume", str(folder)]) == 0
    assert_same_bits(outcome(base / "runs" / "unstopped"), outcome(folder))


@pytest.mark.slow
def test_the_reward_rises_and_the_log_has_its_figures(base, capsys):
    changes = {"num_iterations": 40, "examples_per_step": 4, "num_samples": 8, "mean_rows": 8, "rate_scale": 1}
    assert run(base, "rises", **changes, eval_every=0, save_every=0, sample_every=20) == 0
    folder = base / "runs" / "rises"
    before, after = (record["reward"] for record in records(folder, "val"))
    assert after > 2 * before + 0.05
    step = records(folder, "train")[-1]
    assert step["reward_std"] >= 0
    assert 1 <= step["answer_tokens"] <= 9
    assert 0 <= step["ended"] <= 1
    assert 0 <= step["informative"] <= 1
    assert step["tokens_per_second"] > 0
    assert set(records(folder, "val")[0]) == {"kind", "step", "pass@1", "pass@2", "reward", "ended"}
    assert len(records(folder, "sample")) == 2
    out = capsys.readouterr().out
    assert "step 40/40 100% | reward " in out
    assert "step 0: evaluation pass@1 0.000, pass@2 0.000, mean reward " in out
    assert "sample, reward " in out
    assert load_model(folder)[2]["task"] == str(base / "task.py")


def test_other_commands_take_the_run(base, capsys):
    assert run(base, "taken", num_iterations=1) == 0
    folder = base / "runs" / "taken"
    capsys.readouterr()
    assert evaluate.main(["--checkpoint", str(folder)]) == 2
    assert "was fine-tuned on conversations; set --data to a text" in capsys.readouterr().err
    assert finetune.main(["--resume", str(folder)]) == 2
    assert "was created by nanochat_native.reinforce" in capsys.readouterr().err
    assert run(base, "of_taken", checkpoint=folder, num_iterations=1) == 0
    assert load_model(base / "runs" / "of_taken")[2]["base"]["run"] == str(folder)


def test_a_model_that_diverges_ends_the_run_without_a_checkpoint(base, monkeypatch, capsys):
    def broken(*args, **kwargs):
        return [rollouts.Rollout([1, 2], [False, True], "", False, math.nan)] * 8

    monkeypatch.setattr(rollouts.Engine, "generate", broken)
    monkeypatch.setattr("nanochat_native.training.reinforcement.draw", broken)
    assert run(base, "diverges", max_skipped_steps=2, sample_every=0) == 1
    assert "2 steps in a row" in capsys.readouterr().out


@pytest.mark.slow
def test_ranks_train_as_one_process(base):
    assert run(base, "one") == 0
    command = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["nanochat_native.reinforce", "--", *flags(base, "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": python()}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    (one, weights), (two, others) = outcome(base / "runs" / "one"), outcome(base / "runs" / "two")
    assert [row[:2] for row in one] == [row[:2] for row in two]
    assert [row[2:] for row in one[:1]] == [pytest.approx(row[2:], abs=1e-6) for row in two[:1]]
    for row, other in zip(one, two, strict=True):
        assert row[3] == pytest.approx(other[3], abs=1e-6)
    for name, tensor in weights.items():
        if name.startswith("model/"):
            torch.testing.assert_close(tensor, others[name], atol=1e-4, rtol=1e-3, msg=name)


# --- tasks ---


def test_the_right_answers_of_the_embedded_tasks_pass():
    for name in reward_tasks.EMBEDDED:
        task = reward_tasks.load_task(name)
        assert reward_tasks.load_task(name).train == task.train
        for example in [*task.train, *task.val]:
            conversations.check_messages(list(example["messages"]))
            content = example["messages"][-1]["content"]
            assert task.reward(example, "") < 1
            if name == "arithmetic":
                code, output, text = (part["text"] for part in content)
                assert calculate(code) == output == text
                assert task.reward(example, f"<<{code}={output}>>{text}") == 1
                assert task.reward(example, text) == 1
                assert task.reward(example, f"<<{code}={output}>>{text} or 7") == 0.5
                assert task.reward(example, f"<<{code}={output}7>>7") == 0
            else:
                assert task.reward(example, content) == 1
        train, val = ({e["messages"][0]["content"] for e in split} for split in (task.train, task.val))
        assert train.isdisjoint(val)
        assert (len(task.train), len(task.val)) == (512, 64)
    spelling = reward_tasks.load_task("spelling")
    example = {"messages": [], "spelled": "b-a-k-e"}
    assert [spelling.reward(example, text) for text in ("b-a-k-e", "b-a-x-e", "b-a", "b-a-k-e-s", "x")] == [
        1.0,
        0.25,
        0.25,
        0.5,
        0.0,
    ]


def test_the_answers_of_a_task_are_written_for_finetune(base, tmp_path, capsys):
    path = tmp_path / "chats.jsonl"
    assert reinforce.main(["--task", "spelling", "--write-chats", str(path)]) == 0
    assert "512 conversations for finetune --data" in capsys.readouterr().out
    first = json.loads(path.read_text().splitlines()[0])
    assert first["messages"] == reward_tasks.load_task("spelling").train[0]["messages"]
    assert reinforce.main(["--task", "arithmetic", "--write-chats", str(path)]) == 2
    assert f"--write-chats must be a new file, got {path}" in capsys.readouterr().err
    assert reinforce.main(["--task", str(base / "task.py"), "--write-chats", str(path)]) == 2
    assert "no training example ends with an answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def examples(split:\n", ", line 1: SyntaxError: "),
        ("import nothing_of_this_name\n", ", line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("x = 1\n", ": it must define the functions examples(split) and reward(example, answer)"),
        ("raise SystemExit(0)\n", ", line 1: SystemExit: 0"),
        (TASK.replace("    words =", "    1 / 0\n    words ="), ", line 3: ZeroDivisionError: division by zero"),
        ("def examples(split): return []\ndef reward(e, a): return 0\n", "must return a list with at least one"),
        ("def examples(split): return [3]\ndef reward(e, a): return 0\n", "('train')[0] must be an object with"),
        (
            "def examples(split): return [{'messages': [{'role': 'assistant', 'content': 'x'}]}]\n"
            "def reward(e, a): return 0\n",
            "examples('train')[0]: messages[0].role must be 'user'",
        ),
        (
            TASK.replace("answer.count", "None.count"),
            ", line 7: AttributeError: 'NoneType' object has no attribute 'count'",
        ),
        (
            TASK.replace("return answer", "return None or 'x' or answer"),
            ": reward must return a finite number, got 'x'",
        ),
        (
            TASK.replace("return answer", "return float('nan') or answer"),
            ": reward must return a finite number, got nan",
        ),
        (TASK.replace("return answer", "return 10 ** 400 or answer"), ": reward must return a finite number, got 1000"),
    ],
    ids=str,
)
def test_a_fault_of_a_task_is_one_line_that_names_the_file(base, tmp_path, capsys, source, message):
    path = tmp_path / "faulty.py"
    path.write_text(source)
    assert run(base, "faulty", task=path, overwrite=True, eval_every=0, num_iterations=1) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["faulty.py"], "nothing is written beside the file"


def test_a_fault_in_the_middle_of_a_run_keeps_its_checkpoints(base, tmp_path, capsys):
    path = tmp_path / "late.py"
    calls = "calls = 0\n" + TASK.replace("    return answer", "    global calls\n    calls += 1\n    return answer")
    path.write_text(calls.replace("return answer", "return (1 if calls < 30 else 1 / 0) * answer"))
    assert run(base, "late", task=path, num_iterations=6, eval_every=0) == 2
    assert "late.py, line " in capsys.readouterr().err
    assert checkpoint.steps(base / "runs" / "late" / "checkpoints") == [2]
    path.write_text(TASK)
    assert reinforce.main(["--resume", str(base / "runs" / "late")]) == 2
    assert "is not what this run began with (--task" in capsys.readouterr().err


def test_a_fault_in_an_evaluation_ends_the_run(base, tmp_path, capsys):
    path = tmp_path / "unfair.py"
    path.write_text(
        TASK.replace("    return answer", "    1 / (example['messages'] not in HELD_OUT)\n    return answer")
    )
    path.write_text(f"{path.read_text()}\nHELD_OUT = [example['messages'] for example in examples('val')]\n")
    assert run(base, "unfair", task=path, overwrite=True) == 2
    output = capsys.readouterr()
    assert re.fullmatch(r"error: .*unfair\.py, line \d+: ZeroDivisionError: division by zero\n", output.err)
    assert records(base / "runs" / "unfair", "val") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": None}, "--checkpoint RUN is needed"),
        ({"checkpoint": "/nowhere"}, "no such run folder"),
        ({"task": "/nowhere.py"}, "--task /nowhere.py: No such file or directory"),
        ({"task": "sums"}, "--task must be arithmetic, spelling, gsm8k or a Python file, got"),
        ({"depth": 3}, "--depth follows from the base model"),
        ({"data": "x"}, "--data is not a flag of reinforce"),
        ({"max_seq_len": 32}, "--max-seq-len is not a flag of reinforce"),
        ({"max_new_tokens": 64}, "--max-new-tokens must be < 64, the length of the model's sequence, got 64"),
        ({"max_new_tokens": 60}, "the prompts have at least "),
        ({"num_samples": 1}, "--num-samples must be a whole number >= 2, because an answer is compared"),
        ({"mean_rows": 3}, "--mean-rows must be a divisor of --num-samples 4, got 3"),
        ({"temperature": 0}, "--temperature must be a finite number > 0, got 0.0"),
        ({"top_k": -2}, "--top-k must be a whole number >= 0, got -2"),
        ({"cuda_graphs": "on"}, "--cuda-graphs must be auto or off"),
        ({"diagnose": True}, "--diagnose is not for training by rewards"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(base, capsys, changes, message):
    assert_refused(capsys, base / "runs" / "mistake", run(base, "mistake", **changes), message)


def test_a_model_that_was_not_trained_on_conversations_is_refused(base, capsys):
    assert run(base, "mistake", checkpoint=base / "runs" / "base") == 2
    assert "--checkpoint must be a model that was trained on conversations" in capsys.readouterr().err


def test_a_bad_task_is_a_config_error():
    with pytest.raises(ConfigError, match="--task must be"):
        reward_tasks.load_task("nothing")


# --- GSM8K ---


def write_gsm8k(folder):
    """Write a tiny GSM8K as `download` leaves it, and return its folder."""
    (folder / "gsm8k/main").mkdir(parents=True)
    for split, numbers in (("train", range(2, 8)), ("test", range(20, 23))):
        rows = [
            {"question": f"say {n}", "answer": f"It is {n}*1,000=<<{n}*1000={n}000>>{n}000.\n#### {n},000"}
            for n in numbers
        ]
        (folder / f"gsm8k/main/{split}-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_gsm8k_is_trained_on_one_split_and_evaluated_on_the_other(tmp_path):
    task = reward_tasks.load_task("gsm8k", write_gsm8k(tmp_path))
    asked = [[reward_tasks.question_of(example)[0]["content"] for example in part] for part in (task.train, task.val)]
    assert [sorted(part) for part in asked] == [[f"say {n}" for n in range(2, 8)], [f"say {n}" for n in range(20, 23)]]
    assert asked[0] == [problem.prompt for problem in read_task("GSM8K", renamed(tmp_path)).problems], "another order"
    example = task.train[asked[0].index("say 3")]
    answers = {"It is <<3*1000=3000>>3000. #### 3000": 1, "#### 3,000": 1, "3000": 0, "#### 3000 #### 4": 1}
    answers["#### 4"] = 0
    assert {answer: task.reward(example, answer) for answer in answers} == answers


def renamed(folder):
    """Return a folder whose test split is the training split of another."""
    other = folder / "renamed"
    (other / "main").mkdir(parents=True)
    shutil.copy(folder / "gsm8k/main/train-00000.jsonl", other / "main/test-00000.jsonl")
    return other


def test_a_run_on_gsm8k_resumes_and_writes_its_solutions(base, tmp_path, capsys):
    write_gsm8k(tmp_path)
    values = {"task": "gsm8k", "task_data": tmp_path, "eval_examples": 3}
    assert run(base, "gsm8k", **values | {"num_iterations": 2}) == 0
    assert reinforce.main(["--resume", str(base / "runs/gsm8k"), "--num-iterations", "4"]) == 0
    assert [record["step"] for record in records(base / "runs/gsm8k", "val")] == [0, 2, 4]
    assert run_folder.load_config(base / "runs/gsm8k").task_data == tmp_path
    chats = tmp_path / "chats.jsonl"
    args = ["--task", "gsm8k", "--task-data", tmp_path, "--write-chats", chats]
    assert reinforce.main([str(arg) for arg in args]) == 0
    written = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    (parts,) = [answer["content"] for question, answer in written if question["content"] == "say 2"]
    assert [part["text"] for part in parts] == ["It is 2*1,000=", "2*1000", "2000", "2000.\n#### 2,000"]
    (tmp_path / "gsm8k/main/train-00000.jsonl").write_text('{"question": "say 1", "answer": "#### 1"}\n')
    capsys.readouterr()
    assert reinforce.main(["--resume", str(base / "runs/gsm8k"), "--num-iterations", "6"]) == 2
    assert f"--task gsm8k, --task-data {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "gsm8k"}, "--task gsm8k: --task-data FOLDER must name the folder of its files"),
        ({"task": "gsm8k", "task_data": "nowhere"}, "--task-data must be a folder, got "),
        ({"task": "gsm8k", "task_data": "."}, "has no main/train*.parquet or .jsonl"),
        ({"task": "arithmetic", "task_data": "."}, "--task-data is for --task gsm8k, got --task arithmetic"),
    ],
)
def test_mistakes_about_gsm8k_are_one_line(base, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, base / "runs/mistake", run(base, "mistake", **changes), message)
