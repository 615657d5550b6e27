"""Prometheus metrics: counters and histograms of the server, gauges read from the engine when somebody scrapes.

Receives final outputs from server/service.py, token gaps from server/streaming.py and answers from server/exchange.py;
/metrics (server/operations.py) renders them. A registry of its own: two servers in one process do not share numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from sapwood.errors import EngineDead
from sapwood.request import RequestOutput

if TYPE_CHECKING:
    from sapwood.engine.engine import EngineStats
    from sapwood.server.service import Service

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
# Seconds. A token on a small model takes a millisecond, a long prompt on a large one minutes.
GAP_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
TIME_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_BUCKETS: Final = tuple(float(2**i) for i in range(18))
# method, route and status as they come from outside must not make series without end
OTHER: Final = "other"


class Metrics:
    """All metrics of one service. Names: sapwood_*, units in the name, as Prometheus wants them."""

    def __init__(self, service: Service) -> None:
        registry = self._registry = CollectorRegistry()

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"sapwood_{name}", about, buckets=buckets, registry=registry)

        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Time between two tokens of a stream", GAP_BUCKETS
        )
        self._first_token = histogram(
            "time_to_first_token_seconds", "From a request's submission to its first token", TIME_BUCKETS
        )
        self._per_token = histogram(
            "time_per_output_token_seconds", "Mean time of a request's tokens behind its first", GAP_BUCKETS
        )
        self._queued = histogram("queue_time_seconds", "From a request's submission to its first step", TIME_BUCKETS)
        self._total = histogram("e2e_request_latency_seconds", "From a request's submission to its end", TIME_BUCKETS)
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of a request", TOKEN_BUCKETS)
        self._generated = histogram("request_generation_tokens", "Tokens generated for a request", TOKEN_BUCKETS)
        self._ended = Counter(
            "sapwood_requests", "Requests that have ended", ["finish_reason", "error"], registry=registry
        )
        self._answers = Counter(
            "sapwood_http_answers", "HTTP answers", ["method", "route", "status"], registry=registry
        )
        registry.register(_EngineCollector(service))
        ProcessCollector(registry=registry)

    def observe(self, output: RequestOutput) -> None:
        """A request has ended."""
        self._ended.labels(str(output.finish_reason), output.error_type or "").inc()
        usage, timing = output.usage, output.timing
        self._prompt.observe(usage.prompt_tokens)
        self._generated.observe(usage.completion_tokens)
        if timing is None:
            return
        self._total.observe(timing.total_s)
        if timing.admitted_s is not None:
            self._queued.observe(timing.admitted_s)
        if timing.first_token_s is not None:
            self._first_token.observe(timing.first_token_s)
            if usage.completion_tokens > 1:
                self._per_token.observe((timing.total_s - timing.first_token_s) / (usage.completion_tokens - 1))

    def count_answer(self, method: str, route: str, status: int) -> None:
        """An answer was given; status 499: its client had left."""
        if method not in ("GET", "HEAD", "POST", "OPTIONS"):
            method = OTHER
        self._answers.labels(method, route, str(status)).inc()

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)


class _EngineCollector:
    """The engine's counters and gauges, at the moment of the scrape."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        try:
            stats = self._service.engine.stats()
        except EngineDead:  # not loaded yet
            return
        yield from _engine_metrics(stats)


def _engine_metrics(stats: EngineStats) -> Iterator[Metric]:
    for name, about, value in (
        ("steps", "Steps the engine has computed", stats.num_steps),
        ("prompt_tokens", "Prompt tokens of requests that have ended", stats.prompt_tokens),
        ("cached_tokens", "Those of them found in the prefix cache", stats.cached_tokens),
        ("generation_tokens", "Tokens generated by requests that have ended", stats.output_tokens),
        ("retractions", "Times a request gave its memory back to be recomputed later", stats.num_retractions),
    ):
        yield CounterMetricFamily(f"sapwood_{name}", about, value)
    total = sum(pool.total for pool in stats.pool)
    in_use = sum(pool.leased + pool.limbo for pool in stats.pool)
    for name, about, gauge in (
        ("num_running_reqs", "Requests that have a row", stats.num_running),
        ("num_queue_reqs", "Requests that wait for a row", stats.num_waiting),
        ("token_usage", "Share of the KV pool in use by running requests", in_use / total if total else 0.0),
        ("step_age_seconds", "Since the step counter last moved; 0 while nothing is computed", stats.step_age_s),
        ("host_plan_microseconds", "Host time to plan a step, mean", stats.plan_us),
        ("host_commit_microseconds", "Host time to take a step's result in, mean", stats.commit_us),
        ("host_output_microseconds", "Host time a step for texts and streams, mean", stats.output_us),
    ):
        yield GaugeMetricFamily(f"sapwood_{name}", about, gauge)
    pages = GaugeMetricFamily("sapwood_kv_pages", "Pages of the KV pool", labels=["group", "state"])
    for group, pool in enumerate(stats.pool):
        for state in ("free", "cached", "leased", "limbo"):
            pages.add_metric([str(group), state], getattr(pool, state))
    yield pages
