"""Exports a trained model as a folder that transformers or nanochat opens."""

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

import nanochat_native
from nanochat_native.data.conversations import chat_template, is_chat_trained, prompt_of, stop_tokens, without_marks
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.inference.engine import complete
from nanochat_native.inference.sampling import Sampling
from nanochat_native.interop import nanochat_export, transformers_config
from nanochat_native.interop.nanochat_files import NANOCHAT, PADDING
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.runs import checkpoint
from nanochat_native.runs.config import EXAMPLES, STDLIB
from nanochat_native.runs.run_folder import load_config
from nanochat_native.runs.saved_model import load_model

SHARD_BYTES = 4 * 10**9  # largest size of a file of weights
TOLERANCE = 1e-4  # allowed difference of float32 logits between transformers and this model
PROMPTS = ("def __init__(self", "Once upon a time", "import os\n\n")
LLAMA_CPP = "0c1e570 of 1 October 2026"  # the revision whose architectures were searched
NOT_IN_LLAMA_CPP = ("value_embeddings", "residual_scalars", "smear", "backout")
VERIFIED_TOKENS = 24  # greedy tokens compared after each prompt


@dataclass
class Options:
    """Export a trained model in the format that transformers, vLLM and others read, or in nanochat's."""

    checkpoint: Path
    """Run folder of `python -m nanochat_native.train` or finetune."""
    out: Path
    """Folder to write; it must not exist, or must be empty."""
    step: int | None = None
    """Checkpoint to use; default: the newest."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the written weights; bfloat16 halves their size and rounds them. With --format nanochat, bfloat16 is for
    the embeddings only, as in nanochat's files. auto: float32, or with that format the types of the imported file."""
    format: Literal["transformers", "safetensors", "nanochat", "gguf"] = "transformers"
    """transformers: for AutoModelForCausalLM and AutoTokenizer, models of --architecture october. safetensors: weights
    under nanochat's names. nanochat: a base directory of nanochat with model_STEP.pt, meta_STEP.json and tokenizer.
    gguf: refused, with the parts of the model that no architecture of llama.cpp has."""
    verify: bool = False
    """Open the folder with transformers, which must be installed, and compare logits and greedy tokens."""


def export(options: Options) -> str:
    """Write the folder, completely or not at all. Return the types of its weights, for the user.

    Raises ValueError for a folder that is not empty and for a model that the format cannot express, and the errors of
    load_model.
    """
    out = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; choose another --out")
    model, tokenizer, meta = load_model(options.checkpoint, options.step, warn=_warn)
    if options.format == "gguf":
        raise ValueError(gguf_refusal(model.config))
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if options.format != "nanochat" and options.dtype == "bfloat16":
        state = {name: parameter.bfloat16() for name, parameter in state.items()}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if options.format == "transformers":
            config = transformers_config.config_of(model.config, bos_id=tokenizer.bos_id, dtype=_types(options, meta))
            _write_json(temporary / "config.json", config)
            ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends_of(tokenizer, meta), "do_sample": False}
            _write_json(temporary / "generation_config.json", ends)
            write_weights(
                temporary, transformers_config.renamed(state, transformers_config.names(model.config.n_layer))
            )
            write_tokenizer(temporary, tokenizer, chat=is_chat_trained(meta))
        elif options.format == "nanochat":
            nanochat_export.check_architecture(model.config)
            padding = _padding(options.checkpoint, meta)
            weights = nanochat_export.weights_of(state, padding, meta, options.dtype)
            trained = load_config(options.checkpoint)
            nanochat_export.write_nanochat(temporary, model.config, weights, tokenizer, meta, trained)
        else:
            _write_json(temporary / "model_config.json", dataclasses.asdict(model.config))
            write_weights(temporary, state)
            tokenizer.save(temporary / "tokenizer")
        (temporary / "README.md").write_text(card(options, model, tokenizer, meta), encoding="utf-8")
        if out.exists():
            out.rmdir()
        temporary.replace(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return _types(options, meta)


def gguf_refusal(config: GPTConfig) -> str:
    """Return the message that names the parts of a model that no architecture of llama.cpp has."""
    parts = [part for part in config.parts_beyond("october") if part in NOT_IN_LLAMA_CPP]
    others = f", and none has {', '.join(parts)}" if parts else ""
    return (
        f"llama.cpp ({LLAMA_CPP}) has no architecture whose MLP is ReLU^2 and that norms queries and keys or bounds "
        f"the logits{others}; --format safetensors supports every model"
    )


def _padding(run: Path, meta: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return the rows that import cut from the weights of nanochat's file, by name."""
    if NANOCHAT not in meta:
        return {}
    return checkpoint.load(run / "checkpoints", meta["step"], warn=_warn)[0].get(PADDING, {})


def write_weights(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or above shard_bytes model-00001-of-00002.safetensors, ... and the index of them."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    _write_json(folder / "model.safetensors.index.json", index)


def ends_of(tokenizer: Tokenizer, meta: Mapping[str, Any]) -> list[int]:
    """Return the ids that end a text, or the answer of a chat model."""
    return [tokenizer.bos_id, *(stop_tokens(tokenizer) if is_chat_trained(meta) else ())]


def write_tokenizer(folder: Path, tokenizer: Tokenizer, *, chat: bool) -> None:
    """Write tokenizer.json and tokenizer_config.json, with the chat template for a chat model.

    Unlike the tokenizer of a run folder, this one puts <|bos|> before a text, as in training.
    """
    tokenizer.save(folder)
    (folder / "bpe.json").unlink()
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, bos, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [tokenizer.bos_id], "tokens": ["<|bos|>"]}},
    }
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<|bos|>"}
    if chat:
        described["normalizer"] = without_marks()
        settings |= {"eos_token": "<|assistant_end|>", "chat_template": chat_template(tokenizer.special_tokens)}
    (folder / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", settings)


def card(options: Options, model: GPT, tokenizer: Tokenizer, meta: Mapping[str, Any]) -> str:
    """Return the model card: shape, training, data and quality of the model."""
    trained = load_config(options.checkpoint)
    bpb = meta.get("validation_bpb")
    quality = "not measured" if bpb is None else f"{bpb:.4f} bits per byte on held-out text of the same data"
    shape = model.config
    ours = f"nanochat-native {meta['nanochat_native']}"
    if meta.get("imported"):
        training = (
            "by another program" + (f", {meta['step']:,} steps" if meta["step"] else "") + f"; imported with {ours}"
        )
        data = "unknown"
    else:
        tokens = meta["step"] * trained.total_batch_size
        training = (
            f"{meta['step']:,} steps of {trained.total_batch_size:,} tokens, {tokens:,} in total, seed {trained.seed}, "
            f"with {ours} (optimizer {trained.optimizer})"
        )
        embedded = {STDLIB: "the sources of Python's standard library", EXAMPLES: "conversations generated by rules"}
        name = embedded.get(trained.data, f"`{Path(trained.data).name}`")
        data = f"{name}, SHA-256 of the tokens {meta['data_hash']}"
    kind = "It continues text. It was not trained to chat and has had no safety training."
    if is_chat_trained(meta):
        kind = "It was fine-tuned on conversations; its tokenizer has the chat template. It has had no safety training."
    is_today = not shape.parts_beyond("today")
    use = _use(options, nanochat_export.folder_of(shape, meta), chat=is_chat_trained(meta), is_today=is_today)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [nanochat]
---
# A nanochat model of depth {shape.n_layer}

{model.num_params():,} parameters: {shape.n_layer} layers, width {shape.n_embd}, {shape.n_head} query and
{shape.n_kv_head} key/value heads, {shape.sequence_len} tokens of context, a vocabulary of {shape.vocab_size:,}.

- Training: {training}. Exported in {_types(options, meta)} with {nanochat_native.__version__}.
- Data: {data}; tokenizer {tokenizer.hash[:16]}.
- Validation: {quality}.
- {kind}

{use}"""


def _types(options: Options, meta: Mapping[str, Any]) -> str:
    """Return the types of the written weights, for the user."""
    if options.format == "nanochat" and options.dtype == "auto" and NANOCHAT in meta:
        return "the types of the imported file"
    if options.format == "nanochat" and options.dtype == "bfloat16":
        return "float32, the embeddings in bfloat16"
    return "float32" if options.dtype == "auto" else options.dtype


def _use(options: Options, folder: Path, *, chat: bool, is_today: bool) -> str:
    """Return the model card's section on opening the folder, and on texts that may contain special tokens.

    folder: that of the checkpoint, in nanochat's base directory.
    """
    if options.format == "nanochat" and not is_today:
        return f"It is a base directory of nanochat of October 2025 with the checkpoint `{folder}`.\n"
    if options.format == "nanochat":
        source = {"chatsft_checkpoints": "sft", "chatrl_checkpoints": "rl"}.get(folder.parts[0])
        command = "base_eval --eval sample" if source is None else f"chat_cli -i {source}"
        return f"""It is a base directory of nanochat with the checkpoint `{folder}`:

```sh
NANOCHAT_BASE_DIR=$PWD python -m scripts.{command} {"--model-tag" if source is None else "-g"} {folder.name}
```
"""
    opened = "The weights have nanochat's names. model_config.json describes the shape, tokenizer/ is the tokenizer.\n"
    protected = ""
    if options.format == "transformers":
        prompt = 'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids'
        if chat:
            prompt = """messages = [{"role": "user", "content": "Who are you?"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)"""
            protected = """\
`apply_chat_template`, and a pipeline that receives messages, never turn the text of a message into a special token:
the template splits the names of special tokens with two invisible characters (U+FDD0 U+FDD1), and the normalizer of
tokenizer.json removes them. This protection is missing in a program that builds its prompt in another way or whose
tokenizer does not apply that normalizer.

"""
        opened = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
{prompt}
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))
```
"""
    return f"""{opened}
## Untrusted text

{protected}In transformers, `tokenizer(text)` turns the name of a special token in a text, e.g. `<|bos|>`, into that
token. For untrusted text use `tokenizer(text, split_special_tokens=True)`, which treats such a name as ordinary
characters.
"""


def verify(options: Options) -> str:
    """Compare the folder, opened by transformers, with the run; return the result as one line.

    Compares float32 logits and greedy tokens of some prompts, and for a chat model a prompt made by its template.
    Raises ImportError without transformers, and ValueError if they differ.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("--verify compares with transformers, which is not installed: pip install 'transformers>=5'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer, meta = load_model(options.checkpoint, options.step, warn=_warn)
    ends = ends_of(tokenizer, meta)
    if options.dtype == "bfloat16":  # the written weights are rounded: compare with those
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
    theirs = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(options.out)
    worst = 0.0
    for prompt in PROMPTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        found = their_tokenizer(prompt).input_ids
        if found != ids:
            raise ValueError(f"transformers tokenizes {prompt!r} as {found}, this program as {ids}")
        with torch.inference_mode():
            difference = (theirs(torch.tensor([ids])).logits - model(torch.tensor([ids]))).abs().max().item()
        worst = max(worst, difference)
        if not difference <= TOLERANCE:
            raise ValueError(f"logits after {prompt!r} must differ by at most {TOLERANCE:.0e}, got {difference:.1e}")
        sampling = Sampling(VERIFIED_TOKENS, temperature=0, stop_tokens=tuple(ends))
        own = [token for piece in complete(model, tokenizer, ids, sampling) for token in piece.tokens]
        drawn = theirs.generate(torch.tensor([ids]), max_new_tokens=VERIFIED_TOKENS, do_sample=False)[0, len(ids) :]
        continued = [token for token in drawn.tolist() if token not in ends]
        if continued != own:
            raise ValueError(
                f"greedy tokens after {prompt!r} differ: {continued} in transformers, {own} in this program"
            )
    if is_chat_trained(meta):
        messages = [{"role": "user", "content": f"a < b, {''.join(tokenizer.special_tokens)}"}]
        found = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if found != (ids := prompt_of(tokenizer, messages, chat_trained=True)):
            raise ValueError(f"the chat template renders {messages} as {found}, this program as {ids}")
    return f"{len(PROMPTS)} prompts: logits within {worst:.1e}, the same {VERIFIED_TOKENS} greedy tokens"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _warn(message: str) -> None:
    print(message, file=sys.stderr)
