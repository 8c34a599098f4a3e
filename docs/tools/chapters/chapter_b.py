"""The generated part of appendix B: the operators and the parameters, from docstrings and from the model.

python docs/tools/chapters/chapter_b.py        # writes it into the appendix
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs/guide/b-symbols.md"
BEGIN, END = "<!-- generated -->", "<!-- /generated -->"
# The chapter that explains an operator.
CHAPTERS = {
    "attention": "[chapter 6](06-attention-without-the-matrix.md)",
    "rms_norm": "[chapter 4](04-model.md)",
    "add_rms_norm": "[chapter 4](04-model.md)",
    "embedding_rms_norm": "[chapter 4](04-model.md)",
    "mix_rms_norm": "[chapter 4](04-model.md)",
    "add_value_embedding": "[chapter 4](04-model.md)",
    "add_value_embedding_backward": "[chapter 4](04-model.md)",
    "smear": "[chapter 4](04-model.md)",
    "newton_schulz": "[chapter 9](09-optimizers.md)",
    "adamw_": "[chapter 9](09-optimizers.md)",
    "muon_momentum_": "[chapter 9](09-optimizers.md)",
    "muon_update_": "[chapter 9](09-optimizers.md)",
    "normuon_update_": "[chapter 9](09-optimizers.md)",
    "newton_schulz_update_": "[chapter 9](09-optimizers.md)",
    "linear_cross_entropy": "[chapter 7](07-loss-and-gradient.md)",
    "linear": "[chapter 12](12-speed.md)",
    "linear_backward": "[chapter 7](07-loss-and-gradient.md)",
    "cached_forward_": "[chapter 13](13-using-it.md)",
    "rotary_norm": "[chapter 5](05-attention.md)",
    "relu_squared": "[chapter 4](04-model.md)",
    "relu_squared_": "[chapter 4](04-model.md)",
    "relu_squared_backward_": "[chapter 11](11-memory-and-ranks.md)",
    "linear_relu_squared": "[chapter 4](04-model.md)",
    "linear_backward_relu_squared": "[chapter 11](11-memory-and-ranks.md)",
}
# Operators that also use kernels of other names than that of their module.
OTHER_SOURCES = {
    "normuon_update_": ("normuon",),
    "newton_schulz_update_": ("newton_schulz",),
    "linear_cross_entropy": ("softcap_cross_entropy",),
    "linear_relu_squared": ("linear",),
    "linear_backward_relu_squared": ("linear",),
}
# What first_sentence shows as code.
FORMULAS = (
    r"softmax\(.*\) v",
    r"softcap tanh\(.*?\)",
    r"p = .*$",
    r"dx = .*$",
    r"x weight\^T",
    r"x / sqrt\(.*eps\)",
    r"rms_norm\(table.*$",
    r"x \+ residual",
    r"v \+ 3 sigmoid\(.*\]",
    r"x \+ smear_lambda .*? x_before",
    r"max\(.*\)\^2",
    r"2 sqrt\(y\) dy",
    r"\w+\(\w+\(\w+(, weight)?\)(, weight)?\)",
)


def operator_list() -> str:
    """Return a list of the operators: what each does, its arguments with shapes, and its files."""
    from nanochat_native import ops

    items = []
    for name in ops.OPERATORS:
        function = getattr(ops, name)
        text = inspect.getdoc(function) or ""
        module = Path(inspect.getsourcefile(function) or "").stem
        sources = [module, *OTHER_SOURCES.get(name, ())]
        files = [ROOT / f"nanochat_native/ops/{module}.py", *kernels(sources), ROOT / f"tests/ops/test_ops_{module}.py"]
        missing = [file.name for file in files if not file.exists()]
        if missing or len(files) < 3:
            raise ValueError(f"{name}: it has no kernel, or there is no {', '.join(missing)}")
        shown = ", ".join(f"`{file.relative_to(ROOT)}`" for file in files)
        begin = f"- **`{name}`** ({CHAPTERS[name]}). {first_sentence(text)}"
        items.append(f"{begin} Tensors: {shapes_of(function)}. Files: {shown}.\n")
    return "".join(items)


def kernels(modules: list[str]) -> list[Path]:
    """Return the files of the kernels of some modules, those for the CPU first."""
    names = {f"{module}{part}" for module in modules for part in ("", "_forward", "_backward", "_hopper")}
    names |= {f"{module}{part}_hopper" for module in modules for part in ("_forward", "_backward")}
    folders = (("csrc/cpu", "*.cpp"), ("csrc/cuda", "*.cu"))
    return [path for folder, ending in folders for path in sorted((ROOT / folder).glob(ending)) if path.stem in names]


def first_sentence(docstring: str) -> str:
    """Return the first sentence of a docstring, in which a formula stays in a code span."""
    line = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z0-9)\]])\. ", line + " ")[0].strip().rstrip(".:")
    for formula in FORMULAS:
        if match := re.search(formula, sentence):
            start, end = match.span()
            return f"{sentence[:start]}`{match[0]}`{sentence[end:]}."
    return f"{sentence}."


def shapes_of(function: Callable[..., Any]) -> str:
    """Return the tensors of an operator with their shapes, from its docstring and its signature: "q (B, Tq, H, D)"."""
    section = re.search(r"^Args:\n((?:    .*\n?)+)", inspect.getdoc(function) or "", re.M)
    types = {name: str(each.annotation) for name, each in inspect.signature(function).parameters.items()}
    found, without = [], []
    for match in re.finditer(r"^    (\w[\w, ]*): (.*)", section[1] if section else "", re.M):
        names, text = match[1], match[2]
        shape = re.match(r"\((?:[^()]|\([^()]*\))*\)", text)
        kind = types[names.split(", ")[0]]
        if shape:
            found.append(f"{names} `{shape[0]}`")
        elif "[torch.Tensor]" in kind:
            found.append(f"{names} (lists)")
        elif kind.endswith("torch.Tensor'>"):
            without.append(names)
    return ", ".join(found or [f"{names} `(...)`" for names in without])


def parameter_table(architecture: str, without: Collection[str] = ()) -> str:
    """Return a table of the parameters of a model: name, shape in letters, and the shape in a d4.

    Args:
        without: names that the table leaves out.
    """
    import torch

    from nanochat_native.model import GPT, GPTConfig
    from nanochat_native.model.config import ARCHITECTURES

    # Sizes that differ, so that a size tells its letter. The first layer has a value embedding.
    lettered = GPTConfig(
        sequence_len=8, vocab_size=1000, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, **ARCHITECTURES[architecture]
    )
    letters = {1000: "V", 1024: "Vp", 64: "C", 256: "4 C", 32: "Hkv D", 2: "Hkv", 3: "L", 12: "12", 24: "24", 1: "1"}
    d4 = GPTConfig.from_depth(4, vocab_size=8192, sequence_len=256, architecture=architecture)
    with torch.device("meta"):
        shapes = {general_name(name): tuple(p.shape) for name, p in GPT(lettered).named_parameters()}
        sizes = {general_name(name): tuple(p.shape) for name, p in GPT(d4).named_parameters()}
    rows = []
    for name, shape in shapes.items():
        if name not in without:
            shown = ", ".join(letters[size] for size in shape)
            optimizer = "Muon" if ".h." in name else "AdamW"
            rows.append([f"`{name}`", f"`({shown})`", f"`({', '.join(map(str, sizes[name]))})`", optimizer])
    return table(["parameter", "shape", "in d4", "optimizer"], rows)


def general_name(name: str) -> str:
    """Return the name of a parameter with N for the number of its layer."""
    return re.sub(r"\.\d+\.", ".N.", name)


def added_parameters() -> str:
    """Return the table of the parameters that the architecture of October 2025 does not have."""
    first = re.findall(r"^\| `([\w.]+)`", parameter_table("october"), re.M)
    return parameter_table("today", without=first)


def table(names: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def generated() -> str:
    """Return the text between the marks."""
    return (
        "\nThe operators of `nanochat_native.ops`, each with the chapter that explains it. The Python module holds\n"
        "the public call and the reference. No CUDA kernel has run on a GPU yet: their tests run in the\n"
        "emulation.\n\n"
        f"{operator_list()}\n"
        "The parameters of the model, `N` standing for the number of the layer:\n\n"
        f"{parameter_table('october')}\n"
        "Today's architecture ([chapter 4](04-model.md#48-what-nanochat-added-later)) has `Vp` rows in place of `V`,\n"
        "and adds:\n\n"
        f"{added_parameters()}\n"
    )


def current(text: str) -> str:
    """Return the text between the marks of a page. Raises ValueError if there are none."""
    _, begin, rest = text.partition(BEGIN)
    inside, end, _ = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must contain {BEGIN} and {END}")
    return inside


def update() -> bool:
    """Write the generated part into the page. Return whether it changed."""
    text = PAGE.read_text(encoding="utf-8")
    new = text.replace(f"{BEGIN}{current(text)}{END}", f"{BEGIN}{generated()}{END}")
    if new != text:
        PAGE.write_text(new, encoding="utf-8")
    return new != text


if __name__ == "__main__":
    print("changed" if update() else "up to date")
