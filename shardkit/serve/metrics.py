"""What a server counts, as Prometheus reads it (text format 0.0.4)."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from shardkit.runtime import EngineStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds


@dataclass
class Histogram:
    """How many values were at most each of BOUNDS, and their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count a value in."""
        at = next((at for at, bound in enumerate(BOUNDS) if seconds <= bound), len(BOUNDS))
        self.counts[at] += 1
        self.total += seconds

    def list_lines(self, name: str, text: str) -> Iterator[str]:
        """Its lines in Prometheus's format."""
        yield from _begin_metric(name, "histogram", text)
        sofar = 0
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self.counts, strict=True):
            sofar += count
            yield f'{name}_bucket{{le="{bound}"}} {sofar}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {sofar}"


@dataclass
class Metrics:
    """What one server has answered.

    Attributes:
        requests: Answers, by path and status.
        in_flight: Requests that are being answered.
        prompt_tokens: Of the requests that were answered.
        new_tokens: Generated for them.
        seconds: From a request to the end of its answer.
        first_token: From a request for tokens to the first of them.
    """

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    in_flight: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: Histogram = field(default_factory=Histogram)
    first_token: Histogram = field(default_factory=Histogram)

    def render_text(self, status: EngineStatus) -> str:
        """All of it and the engine's own numbers, as text."""
        lines = list(_begin_metric("shardkit_requests_total", "counter", "Answers by status."))
        for (path, code), count in sorted(self.requests.items()):
            lines.append(f'shardkit_requests_total{{path="{path}",status="{code}"}} {count}')
        counters = {
            "shardkit_prompt_tokens_total": ("Tokens of prompts.", self.prompt_tokens),
            "shardkit_completion_tokens_total": ("Tokens sent to clients.", self.new_tokens),
            "shardkit_engine_tokens_total": ("Tokens generated.", status.tokens),
            "shardkit_engine_steps_total": ("Steps of generation.", status.steps),
        }
        gauges = {
            "shardkit_requests_in_flight": ("Requests being answered.", self.in_flight),
            "shardkit_sequences_running": ("Sequences that run.", status.running),
            "shardkit_sequences_waiting": ("Sequences that wait.", status.waiting),
            "shardkit_kv_cache_tokens": ("Room in the KV cache.", status.max_batch_tokens),
            "shardkit_alive": ("Whether the ranks can be used.", int(status.alive)),
            "shardkit_draining": ("Whether requests are refused.", int(status.draining)),
        }
        lines += _list_values("counter", counters)
        lines += _list_values("gauge", gauges)
        lines += self.seconds.list_lines("shardkit_request_seconds", "Until an answer's end.")
        lines += self.first_token.list_lines("shardkit_first_token_seconds", "Until a first token.")
        return "\n".join(lines) + "\n"


def _list_values(kind: str, values: Mapping[str, tuple[str, int]]) -> Iterator[str]:
    for name, (text, value) in values.items():
        yield from _begin_metric(name, kind, text)
        yield f"{name} {value}"


def _begin_metric(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
