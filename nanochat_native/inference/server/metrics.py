"""Counters and histograms, and their text in Prometheus's exposition format 0.0.4."""

from collections.abc import Iterable, Mapping, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # upper bounds of buckets


class Counter:
    """A number that only grows, for each combination of labels."""

    def __init__(self, name: str, help_: str, labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.labels = name, help_, tuple(labels)
        self.values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, amount: float = 1.0, *labels: str) -> None:
        self.values[labels] = self.values.get(labels, 0.0) + amount

    def lines(self) -> Iterable[str]:
        yield from _head(self.name, self.help, "counter")
        for labels, value in sorted(self.values.items()):
            yield f"{self.name}{_labels(dict(zip(self.labels, labels, strict=True)))} {_number(value)}"


class Histogram:
    """Counts of observations in seconds, for each upper bound in SECONDS, and their sum."""

    def __init__(self, name: str, help_: str) -> None:
        self.name, self.help = name, help_
        self.counts, self.sum = [0] * (len(SECONDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        place = next((i for i, bound in enumerate(SECONDS) if seconds <= bound), len(SECONDS))
        self.counts[place] += 1
        self.sum += seconds

    def lines(self) -> Iterable[str]:
        yield from _head(self.name, self.help, "histogram")
        total = 0
        for bound, count in zip((*map(_number, SECONDS), "+Inf"), self.counts, strict=True):
            total += count
            yield f"{self.name}_bucket{_labels({'le': bound})} {total}"
        yield f"{self.name}_sum {_number(self.sum)}"
        yield f"{self.name}_count {total}"


class Metrics:
    """The metrics of the server. Gauges are passed when the text is built."""

    def __init__(self) -> None:
        self.requests = Counter("nanochat_requests_total", "Requests answered.", ("route", "status"))
        self.prompt_tokens = Counter("nanochat_prompt_tokens_total", "Tokens of accepted prompts.")
        self.generated_tokens = Counter("nanochat_generated_tokens_total", "Tokens generated.")
        self.gone = Counter("nanochat_disconnects_total", "Clients that disconnected before their answer was complete.")
        self.first_token = Histogram(
            "nanochat_first_token_seconds", "Seconds from the arrival of a request to its first token."
        )
        self.duration = Histogram(
            "nanochat_generation_seconds", "Seconds from the arrival of a request to its last token."
        )

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return all metrics as text; `gauges` maps a name to (help, value)."""
        lines: list[str] = []
        for metric in vars(self).values():
            lines += metric.lines()
        for name, (help_, value) in gauges.items():
            lines += [*_head(name, help_, "gauge"), f"{name} {_number(value)}"]
        return "\n".join(lines) + "\n"


def _head(name: str, help_: str, kind: str) -> list[str]:
    return [f"# HELP {name} {help_}", f"# TYPE {name} {kind}"]


def _labels(labels: Mapping[str, str]) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    inside = ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
