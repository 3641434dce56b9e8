"""Counts and times of a server, as /metrics tells them."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ..engine.request import Stats
from .answers import Update

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Belongs to the event loop; what the engine counts is read when it is asked for."""

    def __init__(self, service):
        self._service = service
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by route and status", ("route", "status"))
        self.cancelled = self._counter("cancelled", "Requests whose client left before the answer was whole")
        self.read = self._counter("prompt_tokens", "Prompt tokens by how they came: read or cached", ("how",))
        self.written = self._counter("written_tokens", "Tokens written")
        self.drafted = self._counter("drafted_tokens", "Guesses that were verified")
        self.accepted = self._counter("accepted_tokens", "Guesses that came true, by who made them", ("by",))
        self.first = self._histogram("first_token_seconds", "Time from a request to its first token")
        self.between = self._histogram("between_tokens_seconds", "Time between tokens")
        self.registry.register(self)
        self._prompt_seconds = self._predicted_seconds = 0.0
        self._prompt_tokens = self._predicted_tokens = self._cached_tokens = self._embedding_passes = 0
        self._longest = self._checked = 0       # tokens of a text; passes that verified guesses

    def _counter(self, name: str, help: str, labels=()) -> Counter:
        return Counter(f"pybmc_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(f"pybmc_{name}", help, buckets=SECONDS, registry=self.registry)

    def clock(self, started: float) -> Clock:
        return Clock(self, started)

    def ended(self, stats: Stats) -> None:
        """An answer is whole."""
        read = stats.prompt_tokens - stats.reused_tokens
        self.read.labels("read").inc(read)
        self.read.labels("cached").inc(stats.reused_tokens)
        self.drafted.inc(stats.draft_n)
        self._prompt_tokens += read
        self._prompt_seconds += stats.prompt_s
        self._predicted_tokens += stats.predicted_tokens
        self._predicted_seconds += stats.predicted_s
        self._cached_tokens += stats.reused_tokens
        self._longest = max(self._longest, stats.prompt_tokens + stats.predicted_tokens)
        self._checked += sum(n for k, n in stats.lengths.items() if k)

    def embedded(self, n: int) -> None:
        """A pass read n tokens for embeddings."""
        self.read.labels("read").inc(n)
        self._prompt_tokens, self._embedding_passes = self._prompt_tokens + n, self._embedding_passes + 1

    def collect(self):
        """What the engine and its thread count, and llama-server's names for what means the same."""
        worker = self._service.worker
        engine = worker.engine
        running, kept = list(engine.running), engine.prefixes
        rows = sum(len(s.text) for s in running) + kept.rows
        waiting = max(len(engine.waiting), len(worker.waiting))
        for name, help, value in (
                ("pybmc_waiting", "Requests that wait", waiting),
                ("pybmc_running", "Sequences that are read or written", len(running)),
                ("pybmc_rows", "Rows of keys and values, those of ended sequences included; "
                               "shared ones count each time", rows),
                ("pybmc_kept_rows", "Rows of ended sequences", kept.rows),
                ("llamacpp:requests_processing", "Requests in work", len(running)),
                ("llamacpp:requests_deferred", "Requests that wait", waiting),
                ("llamacpp:n_tokens_max", "Longest text, prompt and answer", self._longest),
                ("llamacpp:n_busy_slots_per_decode", "Sequences in a step, on average",
                 _rate(worker.sequences, worker.steps)),
                ("llamacpp:prompt_tokens_seconds", "Prompt tokens a second",
                 _rate(self._prompt_tokens, self._prompt_seconds)),
                ("llamacpp:predicted_tokens_seconds", "Written tokens a second",
                 _rate(self._predicted_tokens, self._predicted_seconds))):
            yield GaugeMetricFamily(name, help, value)
        for name, help, value in (
                ("pybmc_put_aside", "Sequences that gave up their rows for others", engine.put_aside),
                ("pybmc_steps", "Steps of the engine", worker.steps),
                ("pybmc_busy_seconds", "Seconds in them", worker.busy_seconds),
                ("llamacpp:prompt_tokens", "Prompt tokens read", self._prompt_tokens),
                ("llamacpp:prompt_tokens_cached", "Prompt tokens that were there already",
                 self._cached_tokens),
                ("llamacpp:n_decode", "Steps of the engine, and passes for embeddings",
                 worker.steps + self._embedding_passes),
                ("llamacpp:spec_decode_num_draft_tokens", "Guesses that were verified", _value(self.drafted)),
                ("llamacpp:spec_decode_num_accepted_tokens", "Guesses that came true", _value(self.accepted)),
                ("llamacpp:spec_decode_num_drafts", "Passes that verified guesses", self._checked),
                ("llamacpp:prompt_seconds", "Seconds of reading them", self._prompt_seconds),
                ("llamacpp:tokens_predicted", "Tokens written", self._predicted_tokens),
                ("llamacpp:tokens_predicted_seconds", "Seconds of writing them", self._predicted_seconds)):
            yield CounterMetricFamily(name, help, value)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _value(counter: Counter) -> float:
    """A counter's value, over all labels."""
    samples = [sample for metric in counter.collect() for sample in metric.samples]
    return sum(sample.value for sample in samples if sample.name.endswith("_total"))


def _rate(n: float, seconds: float) -> float:
    return n / seconds if seconds else 0.0


class Clock:
    """Times the tokens of one request's answers."""

    def __init__(self, metrics: Metrics, started: float):
        self._metrics, self._started = metrics, started
        self._last: dict[int, float] = {}

    def note(self, update: Update) -> None:
        now, n = time.perf_counter(), len(update.tokens)
        if n:
            self._metrics.written.inc(n)
            last = self._last.get(update.index)
            if last is None:
                self._metrics.first.observe(now - self._started)
            else:
                for _ in range(n):
                    self._metrics.between.observe((now - last) / n)
            self._last[update.index] = now
        for token in update.tokens:
            if token.by:
                self._metrics.accepted.labels(token.by).inc()
        if update.done and update.stats:
            self._metrics.ended(update.stats)
