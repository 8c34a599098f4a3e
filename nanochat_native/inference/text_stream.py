"""Converts a stream of tokens to text."""

import codecs
from collections.abc import Sequence

from nanochat_native.data.tokenizer import Tokenizer


class TextStream:
    """Text of tokens as they arrive: whole characters, and never a part of a stop string.

    Bytes that are not UTF-8 become U+FFFD.

    Attributes:
        stopped: Whether a stop string has ended the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def put(self, tokens: Sequence[int], *, final: bool = False) -> str:
        """Add tokens; return the text that can no longer change, as put_bytes does."""
        return self.put_bytes(self._tokenizer.decode_bytes(tokens), final=final)

    def put_bytes(self, content: bytes, *, final: bool = False) -> str:
        """Add bytes of the text; return the text that can no longer change.

        The possible beginning of a stop string is held back until `final`. The text ends before the stop string that
        ends first.
        """
        self._held += self._decoder.decode(content, final)
        found = [(self._held.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in self._held]
        if found:
            end, length = min(found)
            self.stopped = True
            out, self._held = self._held[: end + length], ""
            return out
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        split = len(self._held) - keep
        out, self._held = self._held[:split], self._held[split:]
        return out


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
