"""What the server has done, counted: the text that Prometheus reads from `/metrics`."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_TOKENS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Histogram:
    """Seconds, counted by the least of some bounds that they do not exceed."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str, meaning: str) -> list[str]:
        """In Prometheus's text form."""
        found, lines = 0, [f"# HELP {name} {meaning}", f"# TYPE {name} histogram"]
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            found += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {found}')
        return [*lines, f"{name}_sum {self.sum:.6f}", f"{name}_count {found}"]


class Metrics:
    """Counters and histograms of one server; `gauges` and `counters` are asked for their values when they are read."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by route and status
        self.tokens: Counter[str] = Counter()  # prompt, cached and completion
        self.pictures = 0
        self.disconnects = 0
        self.first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.between_tokens = Histogram(BETWEEN_TOKENS_SECONDS)
        self.decode_rate = 0.0  # tokens/s of the answer that was finished last
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "decode_tokens_per_second": ("Of the answer that was finished last.", lambda: self.decode_rate)
        }
        self.counters: dict[str, tuple[str, Callable[[], float]]] = {
            "pictures": ("Pictures shown.", lambda: self.pictures),
            "disconnects": ("Clients that left before their answer was complete.", lambda: self.disconnects),
        }

    def text(self) -> str:
        """Everything, in Prometheus's text form."""
        lines = ["# HELP fastvlm_requests_total Requests answered.", "# TYPE fastvlm_requests_total counter"]
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'fastvlm_requests_total{{route="{route}",status="{status}"}} {count}')
        lines += ["# HELP fastvlm_tokens_total Tokens, by kind.", "# TYPE fastvlm_tokens_total counter"]
        lines += [
            f'fastvlm_tokens_total{{kind="{kind}"}} {self.tokens[kind]}' for kind in ("prompt", "cached", "completion")
        ]
        for kind, end, values in (("counter", "_total", self.counters), ("gauge", "", self.gauges)):
            for name, (meaning, value_of) in values.items():
                full = f"fastvlm_{name}{end}"
                lines += [f"# HELP {full} {meaning}", f"# TYPE {full} {kind}", f"{full} {_number(value_of())}"]
        lines += self.first_token.lines(
            "fastvlm_first_token_seconds", "Seconds from a request's arrival to its first token."
        )
        lines += self.between_tokens.lines("fastvlm_between_tokens_seconds", "Seconds between two pieces of an answer.")
        return "\n".join([*lines, ""])


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
