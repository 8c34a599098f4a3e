"""The calculator that a model calls while it writes: arithmetic, and the number of times that a text has another.

A model that was trained on conversations with code writes `<|python_start|>12 * 1.5<|python_end|>`. The engine
computes the expression and puts `<|output_start|>18<|output_end|>` after it, as nanochat's engine does. In the text of
the answer this shows as `<<12 * 1.5=18>>`, the form of GSM8K (arXiv:2110.14168). nanochat checks the characters of the
expression and calls Python's eval; this is a parser of the grammar

    sum      = product (("+" | "-") product)*
    product  = factor (("*" | "/" | "//") factor)*
    factor   = ("+" | "-")* (number | count | "(" sum ")")
    number   = 12, 1,234 (commas mean nothing), 0.5, .5
    count    = text ".count(" text ")"
    text     = '...' or "...", with \\\\, \\' and \\" for these characters

The arithmetic is exact (rational numbers), and the result is written as people write it: 48 / 2 is 24, not 24.0, and
0.1 + 0.2 is 0.3. So do the conversations of GSM8K, from which models learn to calculate.
"""

import re
from collections.abc import Callable
from fractions import Fraction

from nanochat_native.data import conversations
from nanochat_native.data.tokenizer import Tokenizer

MAX_CHARS = 256  # of an expression: they bound the digits of the result, and so its time
MAX_DEPTH = 32  # of parentheses
DIGITS = 12  # of a result that is no whole number, of which at least two are decimals
SMALL = Fraction(1, 10_000)  # results below this are written with an exponent

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>(?:\d[\d,]*)?\.\d+|\d[\d,]*\.?)
    |(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    |(?P<sign>//|[-+*/()]|\.count\())\s*""",
    re.VERBOSE | re.ASCII,
)


def calculate(expression: str) -> str | None:
    """Return the result of an expression; None if it is none, is too long or too deep, or divides by zero."""
    if len(expression) > MAX_CHARS:
        return None
    try:
        value = _Parser(_tokens(expression)).result()
    except (ArithmeticError, ValueError):
        return None
    return _written(value)


def _written(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    if abs(value) < SMALL:
        return f"{float(value):.{DIGITS}g}"
    size = abs(value)
    decimals = max(2, DIGITS - (len(str(int(size))) if size >= 1 else 0))
    whole, rest = divmod(round(size * 10**decimals), 10**decimals)
    text = f"{whole}.{rest:0{decimals}d}".rstrip("0").rstrip(".")
    return f"-{text}" if value < 0 else text


def _tokens(expression: str) -> list[tuple[str, str]]:
    """Return (kind, text) of each token. Raises ValueError for other characters."""
    found, end = [], 0
    while end < len(expression):
        match = _TOKEN.match(expression, end)
        if match is None:
            raise ValueError("no token")
        found.append((str(match.lastgroup), match[str(match.lastgroup)]))
        end = match.end()
    return found


class _Parser:
    """Evaluates tokens from left to right. Raises ValueError for what the grammar does not have."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._left = tokens[::-1]
        self._depth = 0

    def result(self) -> Fraction:
        value = self._sum()
        if self._left:
            raise ValueError("more than one expression")
        return value

    def _take(self, *signs: str) -> str | None:
        """Return the next token if it is one of the signs."""
        if self._left and self._left[-1][0] == "sign" and self._left[-1][1] in signs:
            return self._left.pop()[1]
        return None

    def _next(self, kind: str) -> str:
        if not self._left or self._left[-1][0] != kind:
            raise ValueError(f"no {kind}")
        return self._left.pop()[1]

    def _sum(self) -> Fraction:
        return self._chain(self._product, "+", "-")

    def _product(self) -> Fraction:
        return self._chain(self._factor, "*", "/", "//")

    def _chain(self, part: Callable[[], Fraction], *signs: str) -> Fraction:
        value = part()
        while sign := self._take(*signs):
            value = _combined(sign, value, part())
        return value

    def _factor(self) -> Fraction:
        negative = False
        while sign := self._take("+", "-"):
            negative ^= sign == "-"
        value = self._atom()
        return -value if negative else value

    def _atom(self) -> Fraction:
        if self._take("("):
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise ValueError("too deep")
            value = self._sum()
            self._depth -= 1
            self._expect(")")
            return value
        if self._left and self._left[-1][0] == "text":
            text = _unquoted(self._next("text"))
            self._expect(".count(")
            part = _unquoted(self._next("text"))
            self._expect(")")
            return Fraction(text.count(part))
        return Fraction(self._next("number").replace(",", ""))

    def _expect(self, sign: str) -> None:
        if not self._take(sign):
            raise ValueError(f"no {sign}")


def _combined(sign: str, left: Fraction, right: Fraction) -> Fraction:
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "*":
        return left * right
    return Fraction(left // right) if sign == "//" else left / right


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1])


class CodeReader:
    """Follows the tokens of a text and acts on the code in it; see Sampling.code.

    Attributes:
        code: The code of a "call", once it is complete.
    """

    def __init__(self, tokenizer: Tokenizer, action: str) -> None:
        """Raises ValueError for a tokenizer without the special tokens of code."""
        ids = conversations.special_ids(tokenizer, conversations.CODE_TOKENS)
        self._tokenizer, self._calls = tokenizer, action == "call"
        self._code_start, self._code_end, self._output_start, self._output_end = ids
        self._tokens: list[int] | None = None  # of the code so far; None outside of code
        self.code: str | None = None

    def put(self, token: int) -> tuple[bytes, list[int]]:
        """Add a token. Return its bytes in the text, and the tokens that follow it without being drawn."""
        if token == self._code_start:
            self._tokens = []
            return self._shown(b"<<"), []
        if self._tokens is None:
            marks = {self._output_start: b"=", self._output_end: b">>"}
            return marks.get(token) or self._tokenizer.decode_bytes([token]), []
        if token != self._code_end:
            self._tokens.append(token)
            return self._shown(self._tokenizer.decode_bytes([token])), []
        code, self._tokens = self._tokenizer.decode(self._tokens), None
        if self._calls:
            self.code = code
            return b"", []
        result = calculate(code)
        if result is None:
            return b">>", []
        return b"", [self._output_start, *self._tokenizer.encode(result), self._output_end]

    def _shown(self, content: bytes) -> bytes:
        """Return the content of code as it shows in the text: that of a call does not."""
        return b"" if self._calls else content
