"""The figures of /metrics, in a registry of this server's own."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counters and gauges of one served model. `active` and `waiting` are the engine's own figures."""

    def __init__(self, model: str) -> None:
        registry = self._registry = CollectorRegistry()
        self._predicted = Gauge(
            "meshwright_predicted", "What the serving plan predicts at full load", ["figure"], registry=registry
        )
        Gauge("meshwright_model_info", "The model served", ["model"], registry=registry).labels(model).set(1)
        self.requests = Counter(
            "meshwright_requests", "Requests answered, by protocol, route and status", ["wire", "route", "status"],
            registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("meshwright_prompt_tokens", "Prompt tokens read", registry=registry)
        self.generated_tokens = Counter("meshwright_generated_tokens", "Tokens generated", registry=registry)
        self.cancelled = Counter(
            "meshwright_cancelled_choices", "Choices cancelled before their end", registry=registry
        )
        self.active = Gauge("meshwright_engine_active", "Sequences in the engine's batch", registry=registry)
        self.waiting = Gauge("meshwright_engine_waiting", "Sequences that wait for a slot", registry=registry)
        self.open_choices = Gauge("meshwright_open_choices", "Choices not yet ended", registry=registry)
        self.first_token_seconds = Histogram(
            "meshwright_first_token_seconds", "From request to first token", buckets=_SECONDS, registry=registry
        )
        self.request_seconds = Histogram(
            "meshwright_request_seconds", "From request to its end", buckets=_SECONDS, registry=registry
        )

    def predict(self, figures: Mapping[str, float]) -> None:
        """Show the plan's figures: tokens per second and seconds per token."""
        for figure, value in figures.items():
            self._predicted.labels(figure).set(value)

    def as_text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
