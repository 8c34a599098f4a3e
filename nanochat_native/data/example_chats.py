"""Conversations to try fine-tuning with, made up by a few rules: the same ones at every call."""

import random
from collections.abc import Callable, Iterator
from typing import Any

# fmt: off
WORDS = (
    "apple", "bridge", "candle", "dragon", "engine", "forest", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "mirror", "needle", "orange", "pencil", "rabbit", "silver", "ticket", "window", "yellow", "zipper",
    "bottle", "camera", "desert", "feather", "guitar", "honey", "iron", "jungle",
)
# fmt: on
NAMES = ("add", "subtract", "multiply", "divide", "power", "larger", "smaller", "remainder")
BODIES = {
    "add": "a + b",
    "subtract": "a - b",
    "multiply": "a * b",
    "divide": "a / b",
    "power": "a ** b",
    "larger": "max(a, b)",
    "smaller": "min(a, b)",
    "remainder": "a % b",
}
WHO = (
    "Who are you?",
    "What are you?",
    "What is your name?",
    "Tell me about yourself.",
    "Are you a person?",
    "Introduce yourself, please.",
)
SELF = "I am a small language model, trained on one computer with nanochat-native."
GREETINGS = ("Hello!", "Hi", "Hey there", "Good morning", "Good evening")
ASKED = ("What is {}?", "How much is {}?", "Compute {}.")

Turn = tuple[str, str]


def _about_itself(rng: random.Random) -> Turn:
    return rng.choice(WHO), SELF


def _greeting(rng: random.Random) -> Turn:
    return rng.choice(GREETINGS), "Hello! How can I help you?"


def _repetition(rng: random.Random) -> Turn:
    words = " ".join(rng.sample(WORDS, 2))
    return f"Repeat after me: {words}", words


def _spelling(rng: random.Random) -> Turn:
    word = rng.choice(WORDS)
    return f"Spell the word {word}.", "-".join(word)


def _sum(rng: random.Random) -> Turn:
    a, b = rng.randrange(10), rng.randrange(10)
    return rng.choice(ASKED).format(f"{a} + {b}"), f"{a} + {b} = {a + b}"


def _function(rng: random.Random) -> Turn:
    name = rng.choice(NAMES)
    return f"Write a Python function {name} of a and b.", f"def {name}(a, b):\n    return {BODIES[name]}"


KINDS: tuple[Callable[[random.Random], Turn], ...] = (
    _about_itself,
    _greeting,
    _repetition,
    _spelling,
    _sum,
    _function,
)


def example_chats(count: int = 600) -> list[list[dict[str, Any]]]:
    """`count` conversations of one to three turns: greetings, who it is, repeating, spelling, sums, small functions."""
    rng = random.Random(0)

    def messages() -> Iterator[dict[str, Any]]:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            question, answer = rng.choice(KINDS)(rng)
            yield {"role": "user", "content": question}
            yield {"role": "assistant", "content": answer}

    return [list(messages()) for _ in range(count)]
