"""CORE against a plain reference that scores one sequence at a time, and against answers that are known."""

import json
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from backends import BACKENDS, use
from ranks import run
from tiny_run import BACKEND

from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.evaluation import core_score
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.runtime.distributed import RankError, World

WORDS = [
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "house",
    "tree",
    "runs",
    "jumps",
    "the",
    "a",
    "one",
    "two",
    "not",
    "very",
]


def sentence(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def tasks_of_all_kinds():
    """{label: (entry of core.yaml, baseline, items)}; several shots and delimiters, ties, prompts of every length."""
    rng = random.Random(0)

    def choice(options):
        choices = [sentence(rng, 1, 4) for _ in range(options)]
        return {"query": sentence(rng, 2, 12), "choices": choices, "gold": rng.randrange(options)}

    choices = [choice(4) for _ in range(13)]
    ties = [choice(3) for _ in range(9)]
    for item in ties[:6]:  # the same twice or all three, and one that another begins with
        item["choices"] = [item["choices"][0], item["choices"][0], item["choices"][0] + " dog"]
    for item in ties[:2]:
        item["choices"] = ["cat"] * 3
    ties[2]["choices"].reverse()
    schemas = [
        {
            "context_options": [sentence(rng, 2, 9) for _ in range(2)],
            "continuation": sentence(rng, 1, 6),
            "gold": rng.randrange(2),
        }
        for _ in range(11)
    ]
    language = [{"context": sentence(rng, 1, 9) + rng.choice(["", " ", "\n", " \n "])} for _ in range(12)]
    for item in language:
        item["continuation"] = rng.choice(WORDS)

    def entry(kind, shots, delimiter):
        return {"icl_task_type": kind, "num_fewshot": [shots], "continuation_delimiter": delimiter}

    return {
        "choices": (entry("multiple_choice", 2, "\nAnswer: "), 25, choices),
        "no shots": (entry("multiple_choice", 0, " "), 25, choices[:5]),
        "ties": (entry("multiple_choice", 1, " "), 30.5, ties),
        "schemas": (entry("schema", 1, " "), 50, schemas),
        "language": (entry("language_modeling", 3, " "), 0, language),
        "long": (entry("language_modeling", 10, "\nA: "), 0, language),
    }


def write_bundle(folder, tasks=None):
    """A folder in the layout of nanochat's eval bundle."""
    tasks = tasks_of_all_kinds() if tasks is None else tasks
    (folder / "eval_data").mkdir(parents=True)
    entries, rows = [], ["Eval Task,Category,Random baseline"]
    for label, (entry, baseline, items) in tasks.items():
        name = f"{label.replace(' ', '_')}.jsonl"
        # JSON is YAML; the default delimiter is left to be a default.
        entries.append({"label": label, "dataset_uri": name} | entry)
        if entry.get("continuation_delimiter") == " ":
            del entries[-1]["continuation_delimiter"]
        rows.append(f"{label},x,{baseline}")
        (folder / "eval_data" / name).write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))
    (folder / "eval_meta_data.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("core") / "bundle")


def make_tokenizer():
    rng = random.Random(1)
    return Tokenizer.train([sentence(rng, 5, 60) for _ in range(40)], 300)


def make_model(vocab_size, seed=0, sequence_len=128, kind=GPT):
    config = GPTConfig(sequence_len, vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL")
    model = kind(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.15, generator=generator))
    return model


# --- the reference: one sequence at a time, all of its logits ---


def reference(model, tokenizer, entry, items, limit=None):
    """Which items are right, in the shuffled order."""
    kind, (shots,), delimiter = entry["icl_task_type"], entry["num_fewshot"], entry["continuation_delimiter"]
    items = list(items)
    random.Random(1337).shuffle(items)
    items = items[:limit]
    results = []
    for index, item in enumerate(items):
        others = [i for i in range(len(items)) if i != index]
        head = ""
        for i in random.Random(1234 + index).sample(others, shots) if shots else []:
            shot = items[i]
            if kind == "multiple_choice":
                head += f"{shot['query']}{delimiter}{shot['choices'][shot['gold']]}\n\n"
            elif kind == "schema":
                head += f"{shot['context_options'][shot['gold']]}{delimiter}{shot['continuation']}\n\n"
            else:
                head += f"{shot['context'].strip()}{delimiter}{shot['continuation']}\n\n"
        if kind == "multiple_choice":
            texts = [f"{head}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
        elif kind == "schema":
            texts = [f"{head}{context}{delimiter}{item['continuation']}" for context in item["context_options"]]
        else:
            text = f"{head}{item['context'].strip()}{delimiter}"
            texts = [text.strip(), text + item["continuation"]]
        tokens = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
        if kind == "language_modeling":
            without, whole = tokens
            assert whole[: len(without)] == without
            losses, right = score_one(model, whole, len(without))
            results.append(all(right))
            continue
        same = 0
        step = 1 if kind == "multiple_choice" else -1
        ordered = [row[::step] for row in tokens]
        while same < min(map(len, tokens)) and len({row[same] for row in ordered}) == 1:
            same += 1
        means = []
        for row in tokens:
            losses, _ = score_one(model, row, same if kind == "multiple_choice" else len(row) - same)
            means.append(sum(losses) / len(losses) if losses else float("nan"))
        results.append(means.index(min(means)) == item["gold"])
    return results


def score_one(model, tokens, start):
    """Losses of tokens[start:] and whether each is the likeliest, of the last tokens that the model takes."""
    off = max(0, len(tokens) - model.config.sequence_len)
    tokens, start = torch.tensor(tokens[off:]), max(1, start - off)
    with torch.no_grad():
        logits = model(tokens[None])[0, start - 1 : -1].double()
    wanted = tokens[start:]
    losses = F.cross_entropy(logits, wanted, reduction="none")
    return losses.tolist(), (logits.argmax(-1) == wanted).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sequence_len", [512, 40])
def test_against_the_reference(bundle, backend, sequence_len):
    tokenizer = make_tokenizer()
    tasks = core_score.read_bundle(bundle)
    specified = tasks_of_all_kinds()
    assert [task.label for task in tasks] == list(specified)
    right = cropped = 0
    with use(backend):
        for seed in range(3):
            model = make_model(tokenizer.vocab_size, seed, sequence_len)
            bias_towards_words(model, tokenizer)
            for task in tasks:
                entry, baseline, items = specified[task.label]
                expected = reference(model, tokenizer, entry, items)
                result = core_score.evaluate_task(model, tokenizer, task, batch_tokens=700)
                assert result.correct == sum(expected), task.label
                assert result.items == len(expected) == len(items)
                assert result.accuracy == result.correct / result.items
                assert result.centred == pytest.approx(
                    (result.accuracy - baseline / 100) / (1 - baseline / 100), abs=1e-12
                )
                right += result.correct
                cropped += result.cropped
    assert 20 < right < 140, "some right, some wrong, or the comparison shows little"
    assert (cropped > 0) == (sequence_len == 40)


def bias_towards_words(model, tokenizer):
    """A random model never finds a word by its highest logits; one that prefers one word does at times."""
    word = tokenizer.encode(" " + WORDS[0])
    with torch.no_grad():
        model.lm_head.weight[word] *= 6


def per_item(model, tokenizer, task, batch_tokens):
    tokens = [
        [np.array([tokenizer.bos_id, *tokenizer.encode(text)]) for text in core_score.prompts(task, i)]
        for i in range(len(task.items))
    ]
    spans = [core_score.spans(task, i, t, model.config.sequence_len) for i, t in enumerate(tokens)]
    items = [(s, item.get("gold", 0)) for s, item in zip(spans, task.items, strict=True)]
    return core_score.score_items(model, task.kind, items, batch_tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_item_is_graded_as_by_the_reference_for_every_batch_size(bundle, backend):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer.vocab_size, sequence_len=96)
    bias_towards_words(model, tokenizer)
    with use(backend):
        for task in core_score.read_bundle(bundle, max_per_task=11):
            if task.label == "no shots":
                continue
            entry, _, items = tasks_of_all_kinds()[task.label]
            expected = reference(model, tokenizer, entry, items, limit=11)
            for batch_tokens in (1, 333, 10**6):
                assert per_item(model, tokenizer, task, batch_tokens) == expected, (task.label, batch_tokens)


class Noisy(GPT):
    """A model whose losses and logits change with what is in the batch, by less than half of `core.MARGIN`."""

    size = 0.49 * core_score.MARGIN

    def forward(self, idx, targets=None, **options):
        out = super().forward(idx, targets, **options)
        if idx.size(0) == 1:
            return out
        noise = 2 * torch.rand(out.shape, generator=torch.Generator().manual_seed(idx.numel())) - 1
        return out + self.size * noise * (1 if targets is None else targets >= 0)


def test_what_a_batch_changes_does_not_change_the_score(bundle, monkeypatch):
    tokenizer = make_tokenizer()
    model = Noisy(GPTConfig(128, tokenizer.vocab_size, 1, 2, 2, 32))
    model.init_weights()  # every loss is ln V

    def scores():
        return [
            {core_score.evaluate_task(model, tokenizer, task, batch_tokens=n).correct for n in (1, 400, 1000, 4000)}
            for task in core_score.read_bundle(bundle)
        ]

    with use("torch"):
        assert max(map(len, scores())) == 1
        monkeypatch.setattr(core_score, "MARGIN", 0.0)
        assert max(map(len, scores())) > 1, "the test would not notice"


def on_rank(folder, backend):
    """What a rank finds; the ranks agree or the caller sees it."""
    use(backend)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer.vocab_size, sequence_len=96)
    bias_towards_words(model, tokenizer)
    world = World()
    if dist.is_initialized():
        world = World(dist.get_rank(), dist.get_world_size(), group=dist.group.WORLD)
    return [
        core_score.evaluate_task(model, tokenizer, t, batch_tokens=600, world=world)
        for t in core_score.read_bundle(folder)
    ]


@pytest.mark.parametrize("size", [2, 3])
def test_the_score_is_the_same_on_every_number_of_ranks(bundle, size):
    with use(BACKEND):
        alone = on_rank(bundle, BACKEND)
    assert run(size, on_rank, bundle, BACKEND) == [alone] * size


def fail_on_one_rank(folder):
    world = World(dist.get_rank(), dist.get_world_size(), group=dist.group.WORLD)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer.vocab_size)
    if world.rank == 1:
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
    try:
        core_score.evaluate_task(model, tokenizer, core_score.read_bundle(folder)[0], batch_tokens=600, world=world)
    except RankError as error:
        return str(error)


def test_an_error_of_one_rank_ends_all(bundle):
    messages = run(2, fail_on_one_rank, bundle)
    assert messages == ["rank 1: the model's losses are not finite: its training has diverged"] * 2


# --- answers that are known ---


def byte_tokenizer():
    return Tokenizer([bytes([i]) for i in range(256)])


def bigram_model(tokenizer, pairs):
    """Certain that the second byte of a pair follows the first; after any other byte all are the same."""
    model = GPT(GPTConfig(64, tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=272))
    model.init_weights()
    with torch.no_grad():
        model.wte.weight.copy_(torch.eye(tokenizer.vocab_size, 272))
        for first, second in pairs:
            model.lm_head.weight[ord(second), ord(first)] = 10.0
    return model


KNOWN = {
    "choice": ({"icl_task_type": "multiple_choice", "num_fewshot": [2], "continuation_delimiter": " "}, 50),
    "schema": ({"icl_task_type": "schema", "num_fewshot": [1], "continuation_delimiter": " "}, 50),
    "language": ({"icl_task_type": "language_modeling", "num_fewshot": [2], "continuation_delimiter": " "}, 0),
}


def known_items(right):
    """The second choice of each four items, first in another, is the one with the pairs wx, xy, yz."""
    golds = [1, 0, 1, 1]
    choices, schemas = [], []
    for number, place in enumerate(golds):
        gold = place if right else 1 - place
        words = ["wyxz", "wyxz"]
        words[place] = "wxyz"
        choices.append({"query": f"q{number}", "choices": words, "gold": gold})
        contexts = ["cb", "dcb"]
        contexts[place] = "ca"
        schemas.append({"context_options": contexts, "continuation": "wxyz", "gold": gold})
    language = [{"context": f"q{n} ", "continuation": "wxyz" if right else "wxzy"} for n in range(4)]
    return {"choice": choices, "schema": schemas, "language": language}


@pytest.mark.parametrize("right", [True, False])
def test_a_certain_model_gets_all_or_nothing(tmp_path, right):
    tasks = {name: (*KNOWN[name], items) for name, items in known_items(right).items()}
    tokenizer = byte_tokenizer()
    model = bigram_model(tokenizer, [" w", "wx", "xy", "yz", "a ", "0 ", "1 ", "2 ", "3 "])
    with use("torch"):
        results = [
            core_score.evaluate_task(model, tokenizer, task, batch_tokens=200)
            for task in core_score.read_bundle(write_bundle(tmp_path / "b", tasks))
        ]
    assert [r.accuracy for r in results] == [float(right)] * 3
    assert [r.centred for r in results] == ([1.0] * 3 if right else [-1.0, -1.0, 0.0])
    assert core_score.score(results) == pytest.approx(1.0 if right else -2 / 3)


def test_a_constant_model_takes_the_first_of_equal_ones(tmp_path):
    items = known_items(True)
    for item in items["choice"]:
        item["choices"] = [item["choices"][0] + "pqr", *item["choices"]]  # means over 3, 6 and 7 tokens
    items["language"][2]["continuation"] = "\0"  # the first token, which argmax takes where all are the same
    tasks = {name: (*KNOWN[name], found) for name, found in items.items()}
    tasks["language"] = (KNOWN["language"][0] | {"continuation_delimiter": ""}, 0, items["language"])
    tokenizer = byte_tokenizer()
    model = bigram_model(tokenizer, [])
    with use("torch"):
        results = [
            core_score.evaluate_task(model, tokenizer, task, batch_tokens=200)
            for task in core_score.read_bundle(write_bundle(tmp_path / "b", tasks))
        ]
    assert [r.accuracy for r in results] == [0.25, 0.25, 0.25]


def test_an_empty_span_is_chosen_as_the_first_option_alone():
    tokens = [np.array([9, 1, 2]), np.array([9, 1])]
    model = bigram_model(byte_tokenizer(), ["\1\2"])
    for order, chosen in (((0, 1), 0), ((1, 0), 0)):
        options = [core_score.crop(tokens[i], 2, 64) for i in order]
        with use("torch"):
            assert core_score.score_items(
                model, core_score.CHOICE, [(options, chosen), (options, 1 - chosen)], 100
            ) == [
                True,
                False,
            ]


# --- the parts ---


def test_shots_are_those_of_a_sample_without_the_item(bundle):
    for items, shots in ((2, 1), (11, 10), (30, 3), (500, 10)):
        task = core_score.Task("t", core_score.LANGUAGE, shots, " ", 0.0, bundle, [{}] * items, [0] * items)
        for index in {0, 1, items // 2, items - 1}:
            others = [i for i in range(items) if i != index]
            assert core_score.shots_of(task, index) == random.Random(1234 + index).sample(others, shots)


def test_the_prompts_of_each_kind():
    def task(kind, items):
        return core_score.Task("t", kind, 1, "=", 0.0, None, items, [1, 2])

    items = [{"query": "p", "choices": ["r", "s"], "gold": 1}, {"query": "q", "choices": ["t", "u"], "gold": 0}]
    assert core_score.prompts(task(core_score.CHOICE, items), 1) == ["p=s\n\nq=t", "p=s\n\nq=u"]
    items = [
        {"context_options": ["p", "q"], "continuation": "r", "gold": 1},
        {"context_options": ["s", "t"], "continuation": "u", "gold": 0},
    ]
    assert core_score.prompts(task(core_score.SCHEMA, items), 0) == ["s=u\n\np=r", "s=u\n\nq=r"]
    items = [{"context": " p \n", "continuation": "r"}, {"context": " s ", "continuation": " u"}]
    assert core_score.prompts(task(core_score.LANGUAGE, items), 1) == ["p=r\n\ns=", "p=r\n\ns= u"]


def test_cropping_takes_from_the_left_and_moves_the_span():
    tokens = np.arange(10)
    assert core_score.crop(tokens, 7, 10)[1:] == (7, 10, 0, 0)
    for start, longest, expected in (
        (7, 6, (3, 6, 4, 0)),
        (7, 4, (1, 4, 6, 0)),
        (7, 3, (1, 3, 7, 1)),
        (2, 4, (1, 4, 6, 5)),
    ):
        found = core_score.crop(tokens, start, longest)
        assert found[1:] == expected
        assert found.tokens.tolist() == list(range(10 - longest, 10))


def test_batches_hold_each_sequence_once_and_keep_their_bounds():
    rng = random.Random(0)
    sequences = []
    for _ in range(40):
        size = rng.randint(2, 30)
        start = rng.randint(1, size)
        sequences.append(core_score.ScoredSpan(np.array([rng.randrange(300) for _ in range(size)]), start, size))
    for tokens, positions in ((1, None), (64, None), (100, 20), (10**6, 5), (10**6, None)):
        seen = []
        for chosen, inputs, targets in core_score.batches(sequences, tokens, positions):
            seen += chosen
            assert inputs.numel() <= tokens or len(chosen) == 1
            assert positions is None or (targets >= 0).sum() <= positions or len(chosen) == 1
            assert inputs.shape == targets.shape
            for row, i in enumerate(chosen):
                span = sequences[i]
                assert inputs[row, : len(span.tokens) - 1].tolist() == span.tokens[:-1].tolist()
                at = (targets[row] >= 0).nonzero()[:, 0].tolist()
                assert at == list(range(span.start - 1, span.end - 1))
                assert targets[row, at].tolist() == span.tokens[span.start :].tolist()
        assert sorted(seen) == [i for i, span in enumerate(sequences) if span.end > span.start]
        assert len(seen) < 40


def test_few_logits_at_once_give_the_same(bundle, monkeypatch):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer.vocab_size)
    bias_towards_words(model, tokenizer)
    task = core_score.read_bundle(bundle)[4]
    tokens = [
        [np.array([tokenizer.bos_id, *tokenizer.encode(text)]) for text in core_score.prompts(task, i)]
        for i in range(12)
    ]
    spans = [core_score.spans(task, i, t, 128)[0] for i, t in enumerate(tokens)]
    rows, logits_of = [], model.logits

    def recorded(n):
        out = logits_of(n)
        rows.append(out.shape)
        return out

    monkeypatch.setattr(model, "logits", recorded)
    with use("torch"):
        many = core_score.greedy(model, spans, 10**6)
        assert rows == [(sum(s.end - s.start for s in spans), tokenizer.vocab_size)]
        monkeypatch.setattr(core_score, "MAX_LOGITS", 4 * tokenizer.vocab_size)
        few = core_score.greedy(model, spans, 10**6)
        assert len(rows) > 4
        assert max(size for size, _ in rows[1:]) <= max(4, *(s.end - s.start for s in spans))
        losses = core_score.total_nll(model, spans, 10**6)
        for span, found in zip(spans, many, strict=True):
            logits = model(torch.from_numpy(span.tokens.astype(np.int64))[None])[0, span.start - 1 : -1].detach()
            wanted = torch.from_numpy(span.tokens[span.start :].astype(np.int64))
            own = logits.gather(1, wanted[:, None])[:, 0]
            others = logits.scatter(1, wanted[:, None], -torch.inf).amax(1)
            assert found.gap == pytest.approx((own - others).min().item(), abs=1e-4)
            assert found.right == (found.gap > 0)
    assert [g.right for g in few] == [g.right for g in many]
    assert [g.total_nll for g in few] == pytest.approx([g.total_nll for g in many], rel=1e-5)
    assert [g.total_nll for g in few] == pytest.approx(losses, rel=1e-5)


def test_shares_are_even_and_whole():
    rng = random.Random(0)
    for ranks in (1, 2, 3, 7):
        sizes = [rng.randint(1, 500) for _ in range(50)]
        found = core_score.balance(sizes, ranks)
        assert sorted(i for share in found for i in share) == list(range(50))
        loads = [sum(sizes[i] for i in share) for share in found]
        assert max(loads) - min(loads) <= max(sizes) / 4
    assert core_score.balance([5], 3) == [[0], [], []]


def test_centred_accuracy():
    assert core_score.centre(0.75, 50) == 0.5
    assert core_score.centre(0.25, 25) == 0
    assert core_score.centre(1, 46.2) == pytest.approx(1, abs=1e-15)
    assert core_score.centre(0, 50) == -1
    assert core_score.centre(0.3, 0) == 0.3


def test_progress_and_a_limit(bundle):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer.vocab_size)
    seen = []
    task = core_score.read_bundle(bundle, max_per_task=11)[0]
    with use("torch"):
        result = core_score.evaluate_task(
            model, tokenizer, task, batch_tokens=500, progress=lambda done, total: seen.append((done, total))
        )
    assert result.items == 11
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == (44, 44)


# --- what is not taken ---


def edit(name, change):
    def apply(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def edit_entry(**values):
    def change(content):
        found = json.loads(content)
        found["icl_tasks"][0] |= values
        return json.dumps(found).encode()

    return edit("core.yaml", change)


def edit_item(kind, line, **values):
    def change(content):
        lines = content.splitlines()
        lines[line - 1] = json.dumps(json.loads(lines[line - 1]) | values).encode()
        return b"\n".join(lines) + b"\n"

    return edit(f"eval_data/{kind}.jsonl", change)


MALFORMED = [
    (lambda folder: (folder / "core.yaml").unlink(), "it has no core.yaml"),
    (edit("core.yaml", lambda _: b"icl_tasks: [1"), "core.yaml: not YAML: "),
    (edit("core.yaml", lambda _: b"\xff\xfe\xff"), "core.yaml: not YAML: "),
    (edit("core.yaml", lambda _: b"tasks: []"), "core.yaml: icl_tasks must be a list of tasks, got None"),
    (edit("core.yaml", lambda _: b"icl_tasks: []"), r"icl_tasks must be a list of tasks, got \[\]"),
    (
        edit("core.yaml", lambda _: b"icl_tasks: [7]"),
        "core.yaml: task 1 must have label, dataset_uri, num_fewshot and icl_task_type, got 7",
    ),
    (edit_entry(label=None), "core.yaml: task 1: label must be a string, got None"),
    (edit_entry(dataset_uri=3), "core.yaml: task 1: dataset_uri must be a string, got 3"),
    (
        edit_entry(icl_task_type="generation"),
        r"task 1 \(choices\): icl_task_type must be one of multiple_choice, .*, got 'generation'",
    ),
    (edit_entry(num_fewshot=2), "num_fewshot must be a list with a whole number >= 0, got 2"),
    (edit_entry(num_fewshot=[]), r"num_fewshot must be a list with a whole number >= 0, got \[\]"),
    (edit_entry(num_fewshot=[-1]), r"num_fewshot must be .*, got \[-1\]"),
    (edit_entry(num_fewshot=[True]), r"num_fewshot must be .*, got \[True\]"),
    (edit_entry(num_fewshot=[13]), "choices.jsonl: task 'choices' must have at least 14 items for 13 shots, got 13"),
    (edit_entry(continuation_delimiter=5), "continuation_delimiter must be a string, got 5"),
    (edit_entry(label="ties"), "core.yaml: task 3: an earlier task has the label 'ties' too"),
    (edit_entry(label="other"), "eval_meta_data.csv: no Random baseline for task 'other'"),
    (lambda folder: (folder / "eval_meta_data.csv").unlink(), "eval_meta_data.csv: No such file"),
    (edit("eval_meta_data.csv", lambda c: c.replace(b"Random", b"random")), "missing column Random baseline"),
    (edit("eval_meta_data.csv", lambda _: b""), "missing column Eval Task, Random baseline"),
    (
        edit("eval_meta_data.csv", lambda c: c.replace(b"x,25", b"x,many")),
        "line 2: Random baseline of 'choices' must be a percentage below 100, got 'many'",
    ),
    (edit("eval_meta_data.csv", lambda c: c.replace(b"x,25", b"x,100")), "must be a percentage below 100, got '100'"),
    (
        edit("eval_meta_data.csv", lambda c: c.replace(b",x,25", b"")),
        "Random baseline of 'choices' must be a percentage below 100, got None",
    ),
    (edit("eval_meta_data.csv", lambda c: c + b"\xff"), "eval_meta_data.csv: not a CSV file in UTF-8"),
    (lambda folder: (folder / "eval_data/choices.jsonl").unlink(), "choices.jsonl: No such file .* task 'choices'"),
    (edit("eval_data/choices.jsonl", lambda c: c + b"{"), "line 14 of task 'choices': not JSON"),
    (edit("eval_data/choices.jsonl", lambda c: c + b"[1]"), r"line 14 of task 'choices' must be an object, got \[1\]"),
    (edit("eval_data/choices.jsonl", lambda c: c + b"\xff"), "task 'choices' is not UTF-8"),
    (edit_item("choices", 3, query=1), "choices.jsonl: line 3 of task 'choices': query must be a string, got 1"),
    (edit_item("choices", 3, choices=[]), r"line 3 of task 'choices': choices must be a list of strings, got \[\]"),
    (edit_item("choices", 3, choices=["a", 1]), r"choices must be a list of strings, got \['a', 1\]"),
    (edit_item("choices", 3, gold=4), "line 3 of task 'choices': gold must be an index into 4 choices, got 4"),
    (edit_item("choices", 3, gold="1"), "gold must be an index into 4 choices, got '1'"),
    (
        edit_item("schemas", 2, continuation=None),
        "schemas.jsonl: line 2 of task 'schemas': continuation must be a string, got None",
    ),
    (edit_item("schemas", 2, context_options="ab"), "context_options must be a list of strings, got 'ab'"),
    (edit_item("schemas", 2, gold=-1), "gold must be an index into 2 context_options, got -1"),
    (edit_item("language", 12, context=None), "line 12 of task 'language': context must be a string, got None"),
]


@pytest.mark.parametrize(("damage", "message"), MALFORMED, ids=[message[-40:] for _, message in MALFORMED])
def test_what_is_malformed_is_named(tmp_path, damage, message):
    folder = write_bundle(tmp_path / "bundle")
    assert len(core_score.read_bundle(folder)) == 6
    damage(folder)
    with pytest.raises(ValueError, match=message):
        core_score.read_bundle(folder)


def test_limits_that_are_not_taken(bundle):
    with pytest.raises(ValueError, match="--max-per-task must be a whole number >= 1, got 0"):
        core_score.read_bundle(bundle, 0)
    with pytest.raises(
        ValueError, match="'long' must have at least 11 items for 10 shots, got 10 with --max-per-task 10"
    ):
        core_score.read_bundle(bundle, 10)


def test_without_yaml_the_extra_is_named(bundle, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(
        ImportError, match=r"reading .*core.yaml requires PyYAML: pip install 'nanochat-native\[eval\]'"
    ):
        core_score.read_bundle(bundle)


@pytest.mark.parametrize("continuation", ["c", ""])
def test_a_continuation_that_merges_with_its_context_is_named(tmp_path, continuation):
    entry = {"icl_task_type": "language_modeling", "num_fewshot": [0], "continuation_delimiter": ""}
    items = [{"context": "ab", "continuation": continuation}]
    (task,) = core_score.read_bundle(write_bundle(tmp_path / "b", {"t": (entry, 0, items)}))
    tokenizer = Tokenizer([*(bytes([i]) for i in range(256)), b"abc"])
    with use("torch"), pytest.raises(ValueError, match=r"t.jsonl: line 1 of task 't': with this tokenizer the tokens"):
        core_score.evaluate_task(make_model(tokenizer.vocab_size), tokenizer, task, batch_tokens=100)


def test_a_diverged_model_is_refused(bundle):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer.vocab_size)
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    for task in core_score.read_bundle(bundle)[3:5]:
        with use("torch"), pytest.raises(ValueError, match="not finite: its training has diverged"):
            core_score.evaluate_task(model, tokenizer, task, batch_tokens=100)
