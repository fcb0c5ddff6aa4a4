"""The store as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ray_pipeline.clock import Clock
from ray_pipeline.metrics.store import MetricsStore

__all__ = ["make_registry"]

_STATES = ("starting", "healthy", "degraded", "unhealthy", "stopped")


class _StoreCollector(Collector):
    def __init__(self, store: MetricsStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def collect(self) -> Iterator[Any]:
        now_ms = self._clock.now_ms()
        generator, job = self._store.generator(now_ms), self._store.job_status(now_ms)
        health = self._store.health(now_ms)
        state = GaugeMetricFamily("ray_pipeline_health", "1 for the state the pipeline is in", labels=["state"])
        for name in _STATES:
            state.add_metric([name], float(name == health.status))
        yield state
        yield _gauge("kafka_connected", "whether a broker answers", float(self._store.kafka_connected))
        yield _gauge("target_rate", "target rate, ratings per second", generator.get("plan_rate"))
        yield _gauge("delivered_rate", "delivered rate, ratings per second", generator["delivered_rate"])
        yield _gauge("behind_seconds", "how long the most overdue rating has been due", generator.get("behind_s"))
        yield _gauge("generator_restarts", "restarts of generator actors and deliveries", generator.get("restarts"))
        delivered = CounterMetricFamily(
            "ray_pipeline_ratings_delivered", "ratings committed, by partition", labels=["partition"]
        )
        for partition, count in generator["partitions"].items():
            delivered.add_metric([partition], count)
        yield delivered
        for name, meaning in (
            ("counted", "ratings counted in tumbling windows"),
            ("late_dropped", "ratings dropped as late"),
            ("rejected", "records that are no valid rating"),
        ):
            counter = CounterMetricFamily(f"ray_pipeline_{name}", meaning)
            counter.add_metric([], float(job.get(name) or 0))
            yield counter
        yield _gauge("lag_records", "records in Kafka that the Spark job has not read", job.get("lag"))
        yield _gauge("batch_duration_seconds", "length of the last micro-batch", _seconds(job.get("batch_duration_ms")))
        yield _gauge("watermark_delay_seconds", "newest event minus watermark", _seconds(job["watermark_delay_ms"]))
        yield _gauge("executors", "Spark executors alive", job.get("executors"))
        latency = GaugeMetricFamily(
            "ray_pipeline_latency_seconds", "rating created to window readable, last 30 s", labels=["quantile"]
        )
        for name, ms in (self._store.latency_ms(now_ms) or {}).items():
            latency.add_metric([f"0.{name[1:]}"], ms / 1000)
        yield latency
        count = GaugeMetricFamily("ray_pipeline_window_count", "ratings in the current window", labels=["window_type"])
        mean = GaugeMetricFamily(
            "ray_pipeline_window_avg_rating", "mean rating of the current window, stars", labels=["window_type"]
        )
        for window_type, record in self._store.summary(now_ms)["windows"].items():
            if record is not None:
                count.add_metric([window_type], record["count"])
                if record["avg_rating"] is not None:
                    mean.add_metric([window_type], record["avg_rating"])
        yield count
        yield mean
        yield from _scores(self._store.scores()["models"])


def _scores(models: list[dict[str, Any]]) -> Iterator[Any]:
    """A learner's errors, and those of the best possible and the baselines on the same ratings."""
    labels = ["model", "predictor", "against"]
    rmse = GaugeMetricFamily("ray_pipeline_prediction_rmse", "root mean squared error, stars", labels=labels)
    mae = GaugeMetricFamily("ray_pipeline_prediction_mae", "mean absolute error, stars", labels=labels)
    scored = GaugeMetricFamily("ray_pipeline_predictions_scored", "predictions that count", labels=["model"])
    coverage = GaugeMetricFamily(
        "ray_pipeline_predictions_coverage", "share of the ratings since the first predicted one", labels=["model"]
    )
    for score in models:
        name = str(score["model"])
        scored.add_metric([name], score["scored"])
        coverage.add_metric([name], score["coverage"])
        for predictor in ("model", "floor", "bias_only", "global_mean"):
            errors = score if predictor == "model" else score[predictor]
            for against in ("observed", "truth"):
                if errors[against]["rmse"] is not None:
                    rmse.add_metric([name, predictor, against], errors[against]["rmse"])
                    mae.add_metric([name, predictor, against], errors[against]["mae"])
    yield from (rmse, mae, scored, coverage)


def make_registry(store: MetricsStore, clock: Clock) -> CollectorRegistry:
    """A registry whose values are the store's at the time of asking."""
    registry = CollectorRegistry()
    registry.register(_StoreCollector(store, clock))
    return registry


def _gauge(name: str, meaning: str, value: float | None) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(f"ray_pipeline_{name}", meaning)
    if value is not None:
        gauge.add_metric([], float(value))
    return gauge


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000
