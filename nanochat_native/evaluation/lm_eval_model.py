"""A trained model as a model of EleutherAI's lm-evaluation-harness, https://github.com/EleutherAI/lm-evaluation-harness.

It requires the extra: pip install 'nanochat-native[eval]'.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_native.evaluation import core_score
from nanochat_native.inference.engine import complete
from nanochat_native.inference.sampling import Sampling
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.hardware import autocast, pick_device

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError(f"lm_eval is not installed ({error}): pip install 'nanochat-native[eval]'") from error

DEFAULT_TOKENS = 256  # of generate_until, if the task does not set max_gen_toks
SUPPORTED = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


@register_model("nanochat_native")
class NanochatLM(LM):
    """The model of a run. Every text is the beginning of a document, after <|bos|>.

    Requests are the harness's `Instance`s; `args` is (context, continuation), (text,) or (context, settings).
    """

    def __init__(
        self,
        checkpoint: str,
        step: int | None = None,
        device: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
    ) -> None:
        """Load the model.

        Args:
            checkpoint: Run folder.
            batch_size: Number of sequences of the model's length that go through it at once.
            max_batch_size: Ignored.

        Raises ValueError for a batch_size below 1, and the errors of load_model and pick_device.
        """
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a whole number >= 1, got {batch_size!r}")
        self.torch_device = pick_device(None if device is None else device)
        self.model, self.tokenizer, _ = load_model(
            Path(checkpoint), step, self.torch_device, warn=lambda message: print(message, file=sys.stderr)
        )
        self.length = self.model.config.sequence_len
        self.batch_tokens = int(batch_size) * self.length

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation in nats, and whether greedy decoding would generate it.

        Spaces at the end of a context belong to the continuation, whose tokens are those after the number of tokens
        that the context has. A context is cropped on the left.

        Raises ValueError for a continuation that is longer than the model's sequence.
        """
        spans = []
        for context, continuation in (request.args for request in requests):
            whole = self._tokens(context + continuation)
            start = min(len(self._tokens(context.rstrip())), len(whole) - (1 if continuation else 0))
            span = core_score.crop(whole, start, self.length + 1)
            if span.cut:
                given = f"got {len(whole) - start} in {continuation!r:.40}"
                raise ValueError(f"a continuation must have at most {self.length} tokens, {given}")
            spans.append(span)
        with autocast(self.torch_device):
            found = core_score.greedy_with_recheck(self.model, spans, self.batch_tokens)
        return [(-one.total_nll, one.right) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text in nats.

        A text longer than the model's sequence is split: every token is predicted once, and the last part after as many
        tokens as fit.
        """
        spans, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            tokens = self._tokens(text)
            for first in range(1, len(tokens), self.length):
                end = min(first + self.length, len(tokens))
                start = max(0, end - self.length - 1)
                spans.append(core_score.ScoredSpan(tokens[start:end], first - start, end - start))
                owners.append(number)
        with autocast(self.torch_device):
            found = core_score.total_nll(self.model, spans, self.batch_tokens)
        totals = [0.0] * len(requests)
        for number, total in zip(owners, found, strict=True):
            totals[number] -= total
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to one of the strings `until`, the end of the document, or max_gen_toks.

        Decoding is greedy unless the settings have do_sample. The stop string is left out. A context is cropped on the
        left to leave room in the model's sequence.

        Raises ValueError for settings that are not SUPPORTED.
        """
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        unknown = sorted(set(settings) - set(SUPPORTED))
        if unknown:
            raise ValueError(
                f"settings of generate_until must be among {', '.join(SUPPORTED)}, got {', '.join(unknown)}"
            )
        until = settings.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        count = int(settings.get("max_gen_toks", DEFAULT_TOKENS))
        if count < 1:
            raise ValueError(f"max_gen_toks must be a whole number >= 1, got {count}")
        sampled = settings.get("do_sample", False)
        prompt = self._tokens(context)[-max(1, self.length - count) :].tolist()
        sampling = Sampling(
            count,
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_k=settings.get("top_k"),
            top_p=settings.get("top_p"),
        )
        written: list[int] = []
        with autocast(self.torch_device):
            pieces = complete(self.model, self.tokenizer, prompt, sampling)
        with contextlib.closing(pieces):
            for piece in pieces:
                written += piece.tokens
                text = self.tokenizer.decode(written)
                places = [text.find(stop) for stop in stops if stop in text]
                if places:
                    return text[: min(places)]
        return self.tokenizer.decode(written)

    def _tokens(self, text: str) -> np.ndarray:
        return np.concatenate([[self.tokenizer.bos_id], self.tokenizer.encode_to_numpy(text)]).astype(np.uint32)
