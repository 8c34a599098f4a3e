"""chat_eval: its scores against problems that are answered one by one, and the command."""

import json
import math
import random

import pytest
import torch
import torch.distributed as dist
from backends import BACKENDS, use
from models import build
from ranks import run as run_ranks
from test_chat_tasks import write_rows, write_tasks
from tiny_run import BACKEND, train, write_text

from nanochat_native import chat_eval, finetune
from nanochat_native.data import conversations
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.evaluation import chat_evaluation, chat_score, sandbox
from nanochat_native.evaluation.chat_score import Drawing, chatcore, evaluate, make_engine
from nanochat_native.evaluation.chat_tasks import BASELINES, NAMES, Problem, Task, choice_prompt
from nanochat_native.inference.engine import Engine, complete
from nanochat_native.inference.sampling import Sampling
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.quantization import matrices, round_weights_
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.distributed import World

# fmt: off
WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "mix", "strange",
    "potions",
]
# fmt: on
TOKENIZER = Tokenizer.train([" ".join(WORDS) * 20], 300)
CONFIG = GPTConfig(sequence_len=96, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=64)


def choice_task(problems=23):
    """Multiple choice with prompts of different lengths and two to five choices."""
    draws = random.Random(1)
    made = []
    for _ in range(problems):
        letters = tuple("ABCDE"[: draws.randint(2, 5)])
        question = " ".join(draws.choices(WORDS, k=draws.randint(1, 30)))
        made.append(Problem(choice_prompt(question, letters, draws.choices(WORDS, k=5)[: len(letters)]), "A", letters))
    return Task("MMLU", made, None)


def writing_task(is_right, problems=9):
    draws = random.Random(2)
    texts = (" ".join(draws.choices(WORDS, k=draws.randint(1, 20))) for _ in range(problems))
    return Task("GSM8K", [Problem(text, str(number)) for number, text in enumerate(texts)], is_right)


def prompt_of(text):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
    tokens, _ = conversations.render(TOKENIZER, messages)
    return tokens[:-1]


def chosen_one_by_one(model, task):
    """The letter of each problem: the likeliest behind its prompt, which goes through the model alone."""
    found = []
    for problem in task.problems:
        with torch.inference_mode():
            last = model(torch.tensor([prompt_of(problem.prompt)]))[0, -1].double()
        logits = [last[TOKENIZER.encode(letter)[0]].item() for letter in problem.letters]
        found.append(problem.letters[logits.index(max(logits))])
    return found


def written_one_by_one(model, task, drawing):
    """The texts of each problem, each written alone, with nanochat's settings."""
    end = TOKENIZER.special_tokens["<|assistant_end|>"]
    found = []
    for i, problem in enumerate(task.problems):
        texts = []
        for sample in range(drawing.samples):
            seed = random.Random(f"{drawing.seed} {task.name} {i} {sample}").getrandbits(32)
            sampling = Sampling(
                *(drawing.max_tokens, drawing.temperature, drawing.top_k),
                **{"stop_tokens": (end,), "code": "compute", "seed": seed},
            )
            pieces = complete(model, TOKENIZER, prompt_of(problem.prompt), sampling)
            texts.append("".join(piece.text for piece in pieces))
        found.append(texts)
    return found


# --- scores ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_choices_are_those_of_one_problem_after_the_other(backend, slots):
    model, task = build(CONFIG), choice_task()
    with use(backend):
        expected = chosen_one_by_one(model, task)
        assert len(set(expected)) >= 3
        shown = []
        engine = make_engine(model, TOKENIZER, slots, 4)
        result = evaluate(task, engine, progress=lambda done, total: shown.append((done, total)))
        questions = [
            (prompt_of(problem.prompt), [TOKENIZER.encode(letter)[0] for letter in problem.letters])
            for problem in task.problems
        ]
        chosen = chat_score.choose(model, questions, slots * 96)
    assert [problem.letters[i] for problem, i in zip(task.problems, chosen, strict=True)] == expected
    correct = expected.count("A")
    assert (result.problems, result.correct, result.accuracy) == (23, correct, correct / 23)
    assert result.centred == pytest.approx((correct / 23 - 0.25) / 0.75)
    assert (result.task, result.baseline, result.sample_accuracy, result.cut) == ("MMLU", 0.25, result.accuracy, 0)
    assert shown[-1] == (23, 23)
    assert len(shown) > 23 / 8 / slots


def test_the_first_of_equal_choices_is_chosen():
    model = build(CONFIG)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    questions = [(prompt_of("fox"), [70, 65, 66]), (prompt_of("fox jumps"), [66, 65])]
    with use("torch"):
        assert chat_score.choose(model, questions, 200) == [0, 0]


def test_close_choices_are_decided_alone(monkeypatch):
    model, seen = build(CONFIG), []
    original = chat_score._choice_logits

    def record(model, questions):
        seen.append(len(questions))
        return original(model, questions)

    monkeypatch.setattr(chat_score, "_choice_logits", record)
    monkeypatch.setattr(chat_score, "margin", lambda model: math.inf)
    with use("torch"):
        chat_score.choose(model, [(prompt_of(word), [65, 66]) for word in WORDS[:4]], 1000)
    assert seen == [4, 1, 1, 1, 1]


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("drawing", [Drawing(max_tokens=12), Drawing(3, 12, 1.0, 50, 7), Drawing(2, 9, 0.5, None, 1)])
def test_answers_are_those_of_one_problem_after_the_other(slots, drawing):
    model = build(CONFIG)
    texts = []

    def is_right(problem, text):
        texts.append((problem.prompt, text))
        return len(text) % 3 == 0

    task = writing_task(is_right)
    with use(BACKEND):
        expected = written_one_by_one(model, task, drawing)
        result = evaluate(task, make_engine(model, TOKENIZER, slots, drawing.max_tokens), drawing)
    prompts = [problem.prompt for problem in task.problems]
    assert sorted(texts) == sorted((prompt, text) for prompt, ts in zip(prompts, expected, strict=True) for text in ts)
    assert len({text for ts in expected for text in ts}) > len(prompts) / 2
    right = [[len(text) % 3 == 0 for text in ts] for ts in expected]
    assert result.correct == sum(map(any, right))
    assert result.sample_accuracy == sum(map(sum, right)) / (9 * drawing.samples)
    assert result.accuracy == result.centred == result.correct / 9
    assert result.baseline == 0


def test_each_text_is_judged_with_its_problem():
    """The answers are what the model writes, but for every third problem. Long prompts have room for short answers, so
    the engine does not finish the answers in the order of the problems."""
    model, capacity = build(CONFIG), 80
    prompts = [prompt for word in WORDS[:5] for prompt in (word, f"{word} 0123456789 0123456789 0123456789 0123456789")]
    lengths = [min(40, capacity - len(prompt_of(prompt))) for prompt in prompts]
    assert lengths == [40, *lengths[1:]]
    assert 20 <= lengths[1] < 40
    with use(BACKEND):
        problems = []
        for i, (prompt, tokens) in enumerate(zip(prompts, lengths, strict=True)):
            alone = Task("GSM8K", [Problem(prompt)], None)
            ((text,),) = written_one_by_one(model, alone, Drawing(max_tokens=tokens))
            assert text
            problems.append(Problem(prompt, text if i % 3 else "-"))
        task = Task("GSM8K", problems, lambda problem, text: text == problem.answer)
        result = evaluate(task, Engine(model, TOKENIZER, slots=4, capacity=capacity), Drawing(max_tokens=40))
    assert (result.correct, result.cut) == (6, 0)


def test_an_answer_ends_at_its_end_token_and_the_calculator_runs():
    """A model that always writes the same token ends the answer with it, or begins code."""
    model = build(CONFIG)
    texts = []
    task = writing_task(lambda problem, text: bool(texts.append(text)), 1)
    for token, text in (("<|assistant_end|>", ""), ("<|bos|>", ""), ("<|python_start|>", "<<<<<<")):
        with torch.no_grad():
            model.lm_head.weight.zero_()
            with use(BACKEND):
                hidden = model.hidden_states(torch.tensor([prompt_of(task.problems[0].prompt)]))[0, -1]
            model.lm_head.weight[TOKENIZER.special_tokens[token]] = hidden
        with use(BACKEND):
            evaluate(task, make_engine(model, TOKENIZER, 1, 3), Drawing(max_tokens=3))
        (written,) = texts
        texts.clear()
        assert written.startswith("<<") if text else written == ""


def test_long_prompts_lose_their_end_and_leave_room():
    model = build(CONFIG)
    long = " ".join(WORDS * 30)
    assert len(prompt_of(long)) > 400
    lengths = []
    task = Task("GSM8K", [Problem(long), Problem("fox")], lambda problem, text: bool(lengths.append(len(text))))
    with use(BACKEND):
        engine = Engine(model, TOKENIZER, slots=2, capacity=200)
        submitted = []
        original = engine.submit
        engine.submit = lambda prompt, sampling: submitted.append((prompt, sampling)) or original(prompt, sampling)
        result = evaluate(task, engine, Drawing(max_tokens=500))
        assert evaluate(choice_task(), engine).cut == 0
    assert result.cut == 1
    (prompt, sampling), (short, more) = submitted
    assert prompt == [*prompt_of(long)[:149], TOKENIZER.special_tokens["<|assistant_start|>"]]
    assert (len(prompt) + sampling.max_tokens, len(short) + more.max_tokens) == (200, 200)


def test_other_requests_of_the_engine_remain(monkeypatch):
    model = build(CONFIG)
    with use(BACKEND):
        engine = make_engine(model, TOKENIZER, 2, 8)
        other = engine.submit(prompt_of("dog"), Sampling(300, temperature=0))
        evaluate(writing_task(lambda problem, text: True), engine, Drawing(max_tokens=8))
        assert len(engine.queue) + len(engine.running) == (other.finish_reason is None)
        engine.cancel(other)
        original, steps = engine.step, []

        def interrupted():
            steps.append(1)
            if len(steps) > 5:
                raise KeyboardInterrupt
            return original()

        monkeypatch.setattr(engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(writing_task(lambda problem, text: True), engine, Drawing(max_tokens=8))
    assert engine.idle


def test_a_diverged_model_and_an_engine_without_text_are_refused():
    model = build(CONFIG)
    with use(BACKEND):
        with pytest.raises(ValueError, match="an engine with a tokenizer"):
            evaluate(choice_task(), Engine(model, None))
        with torch.no_grad():
            model.lm_head.weight.fill_(math.nan)
        engine = make_engine(model, TOKENIZER, 2, 8)
        for task in (choice_task(), writing_task(lambda problem, text: True)):
            with pytest.raises(ValueError, match="logits are not finite"):
                evaluate(task, engine)
        task = Task("MMLU", [Problem("?", "AB", ("AB", "C"))], None)
        with pytest.raises(ValueError, match="the letter of a choice must be one token, got 'AB' with 2"):
            evaluate(task, engine)


def measured_on_rank():
    torch.set_num_threads(1)
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    with use(BACKEND):
        engine = make_engine(build(CONFIG), TOKENIZER, 3, 8)
        tasks = (choice_task(), writing_task(lambda problem, text: len(text) % 3 == 0), choice_task(1))
        return [evaluate(task, engine, Drawing(2, 8, 1.0), world=world)._replace(seconds=0) for task in tasks]


def test_ranks_find_what_one_process_does():
    with use(BACKEND):
        engine = make_engine(build(CONFIG), TOKENIZER, 4, 8)
        tasks = (choice_task(), writing_task(lambda problem, text: len(text) % 3 == 0), choice_task(1))
        alone = [evaluate(task, engine, Drawing(2, 8, 1.0))._replace(seconds=0) for task in tasks]
    assert run_ranks(2, measured_on_rank) == [alone, alone]


def test_chatcore_is_the_mean_of_five_centred_accuracies():
    accuracies = dict(zip(NAMES, (0.5, 0.25, 0.4, 0.1, 0.05, 0.9, 0.9), strict=True))
    assert chatcore(accuracies) == pytest.approx((1 / 3 + 0 + 0.2 + 0.1 + 0.05) / 5)
    assert chatcore({name: BASELINES.get(name, 0) / 100 for name in NAMES}) == 0
    assert chatcore(dict.fromkeys(NAMES, 1.0)) == 1
    assert chatcore({name: 1.0 for name in NAMES if name != "MMLU"}) is None


# --- the command ---


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory):
    """A tiny model that was trained and fine-tuned, in the folder `runs/chat` beside the tasks in `data`."""
    folder = tmp_path_factory.mktemp("chat")
    write_text(folder / "text.jsonl")
    assert train(folder, run="base", steps=4, max_seq_len=64) == 0
    chats = [[{"role": "user", "content": f"Spell {w}"}, {"role": "assistant", "content": ",".join(w)}] for w in WORDS]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    values = {"checkpoint": "runs/base", "data": "chats.jsonl", "val_data": "chats.jsonl", "out_dir": "runs"}
    flags = [part for name, path in values.items() for part in (f"--{name.replace('_', '-')}", str(folder / path))]
    flags += ["--cache-dir", str(folder / "cache"), "--run", "chat", "--device", "cpu", "--num-iterations", "1"]
    assert finetune.main([*flags, "--sample-every", "0", "--backend", BACKEND]) == 0
    write_tasks(folder / "data")
    return folder


def command(capsys, *args):
    with use(BACKEND):
        code = chat_eval.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_measures_what_there_is(chat_run, capsys, tmp_path):
    flags = ("--checkpoint", chat_run / "runs/chat", "--data", chat_run / "data", "--max-problems", 2)
    flags += ("--max-new-tokens", 8, "--device", "cpu")
    code, out, err = command(capsys, *flags, "--out", tmp_path / "found")
    assert code == 0, err
    assert err == "HumanEval  left out: it runs programs that the model writes, and needs --allow-code\n"
    lines = out[out.index("task  ") :].splitlines()  # behind the progress
    rows = [line.split() for line in lines]
    assert rows[0] == ["task", "problems", "accuracy", "baseline", "centred", "seconds"]
    assert [row[:2] for row in rows[1:7]] == [
        *(["ARC-Easy", "2"], ["ARC-Challenge", "2"], ["MMLU", "1"]),
        *(["GSM8K", "1"], ["SpellingBee", "2"], ["SimpleSpelling", "2"]),
    ]
    assert lines[7:] == ["ChatCORE  needs also HumanEval", f"result   {tmp_path / 'found' / 'result.json'}"]
    record = json.loads((tmp_path / "found" / "result.json").read_text())
    assert (record["finished"], record["command"], record["chatcore"]) == (True, "chat_eval", None)
    assert [f"{task['accuracy']:.4f}" for task in record["tasks"]] == [row[2] for row in rows[1:7]]
    assert record["step"] == 1
    # The same without batches, as JSON.
    code, out, _ = command(capsys, *flags, "--device-batch-size", 1, "--json")
    assert code == 0
    again = json.loads(out)

    def without_times(tasks):
        return [{name: value for name, value in task.items() if name != "seconds"} for task in tasks]

    assert without_times(again["tasks"]) == without_times(record["tasks"])
    assert list(again["left_out"]) == ["HumanEval"]


def test_weights_are_rounded_once_and_choices_run_in_the_precision_of_the_flags(chat_run, capsys, monkeypatch):
    engine_weights, choice_weights, precisions = [], [], []
    own_engine, own_evaluate = chat_evaluation.make_engine, chat_evaluation.evaluate

    def weights_of(model):
        return [weight.clone() for weight in matrices(model)]

    def make_engine(model, *args, **settings):
        engine_weights.append(weights_of(model))
        return own_engine(model, *args, **settings)

    def evaluate(task, engine, *args, **settings):
        choice_weights.append(weights_of(engine.model))
        precisions.append(torch.is_autocast_enabled("cpu"))
        return own_evaluate(task, engine, *args, **settings)

    monkeypatch.setattr(chat_evaluation, "make_engine", make_engine)
    monkeypatch.setattr(chat_evaluation, "evaluate", evaluate)
    flags = ("--checkpoint", chat_run / "runs/chat", "--data", chat_run / "data", "--tasks", "ARC-Easy")
    flags += ("--max-problems", 1, "--max-new-tokens", 8, "--device", "cpu", "--json")
    code, out, err = command(capsys, *flags, "--quantize", "int8")
    assert code == 0, err
    assert json.loads(out)["quantize"] == "int8"
    model = load_model(chat_run / "runs/chat", None, torch.device("cpu"))[0]
    exact = weights_of(model)
    round_weights_(model, "int8")
    assert all(map(torch.equal, engine_weights[0], exact))
    assert all(map(torch.equal, choice_weights[0], matrices(model)))
    assert not all(map(torch.equal, choice_weights[0], exact))
    code, out, err = command(capsys, *flags, "--dtype", "bfloat16")
    assert (code, precisions) == (0, [False, True]), err
    assert json.loads(out)["dtype"] == "bfloat16"


def test_programs_run_with_permission_only(chat_run, capsys, monkeypatch):
    flags = ("--checkpoint", chat_run / "runs/chat", "--data", chat_run / "data", "--max-new-tokens", 8, "--json")
    programs = []
    monkeypatch.setattr(sandbox, "check", lambda: True)
    monkeypatch.setattr(sandbox, "run", lambda program: programs.append(program) or sandbox.Outcome(True, False, True))
    code, out, err = command(capsys, *flags, "--tasks", "HumanEval")
    assert (code, out, programs) == (2, "", [])
    assert err == (
        "error: HumanEval cannot be measured: it runs programs that the model writes, and needs --allow-code\n"
    )
    sampled = ("--num-samples", 3, "--temperature", 1, "--max-problems", 1, "--allow-code")
    code, out, err = command(capsys, *flags, *sampled)
    assert code == 0
    assert (
        err == "HumanEval  this system allows no namespaces: programs can read the files of this user, but write none\n"
    )
    assert len(programs) == 3
    assert all(program.startswith("import math\n") and program.endswith("check(area)") for program in programs)
    found = json.loads(out)
    accuracies = {task["task"]: task["accuracy"] for task in found["tasks"]}
    assert accuracies["HumanEval"] == 1
    assert found["chatcore"] == chatcore(accuracies)
    assert found["programs_see_files"] is True


def test_a_system_without_a_sandbox_is_refused(chat_run, capsys, monkeypatch):
    def refuse(*args):
        raise OSError("the sandbox cannot isolate a program on this system: the sandbox needs Linux, got Darwin")

    monkeypatch.setattr(sandbox, "run", refuse)
    flags = ("--checkpoint", chat_run / "runs/chat", "--data", chat_run / "data", "--allow-code")
    assert command(capsys, *flags)[::2] == (
        2,
        "error: the sandbox cannot isolate a program on this system: the sandbox needs Linux, got Darwin\n",
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-problems", 0), "--max-problems must be a whole number >= 1, got 0"),
        (("--num-samples", 0), "--num-samples must be a whole number >= 1, got 0"),
        (("--device-batch-size", -1), "--device-batch-size must be a whole number >= 1, got -1"),
        (("--max-new-tokens", 0), "--max-new-tokens must be a whole number >= 1, got 0"),
        (("--num-samples", 2), "--num-samples 2 requires a --temperature above 0, got 0"),
        (("--temperature", -1), "temperature must be a number >= 0, got -1.0"),
        (("--tasks", "GSM8K"), "GSM8K cannot be measured: --data FOLDER must name the folder of its files"),
        (("--data", "nowhere"), "--data must be a folder, got nowhere"),
        (
            ("--data", "."),
            "--data must have the files of a task, got .: . has no ARC-Easy/test*.parquet or .jsonl with",
        ),
        (("--data", "wrong"), "line 1: answer must end with #### and a number, got 'none'"),
        (("--out", "full"), "--out must be a new or an empty folder, got full"),
        ((), "no such run folder"),
    ],
)
def test_mistakes_are_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "full/x.jsonl", [{}])
    if "wrong" in flags:
        write_rows(tmp_path / "wrong/main/test.jsonl", [{"question": "?", "answer": "none"}])
    code, out, err = command(capsys, "--checkpoint", "none", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err


def test_a_base_model_is_noted(chat_run, capsys):
    code, out, err = command(
        capsys, "--checkpoint", chat_run / "runs/base", "--tasks", "SimpleSpelling", "--max-problems", 1
    )
    assert code == 0
    assert "was not fine-tuned on conversations" in err
    assert "SimpleSpelling" in out


def test_ctrl_c_keeps_what_was_measured(chat_run, capsys, monkeypatch, tmp_path):
    original = chat_evaluation.evaluate

    def interrupted(task, *args, **more):
        if task.name == "MMLU":
            raise KeyboardInterrupt
        return original(task, *args, **more)

    monkeypatch.setattr(chat_evaluation, "evaluate", interrupted)
    flags = ("--checkpoint", chat_run / "runs/chat", "--data", chat_run / "data", "--out", tmp_path / "found")
    code, out, err = command(capsys, *flags)
    assert (code, err.splitlines()[-1]) == (130, "interrupted")
    assert "ARC-Challenge" in out
    record = json.loads((tmp_path / "found/result.json").read_text())
    assert (record["finished"], len(record["tasks"])) == (False, 2)
