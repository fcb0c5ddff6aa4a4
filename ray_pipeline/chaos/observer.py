"""What a reader of the pipeline's topics sees: followed on a thread, looked at from another."""

from __future__ import annotations

import json
import logging
import threading
import urllib.error
import urllib.request
from collections import defaultdict, deque
from typing import Any

from confluent_kafka import KafkaException

from ray_pipeline.chaos.recovery import Sample, ShardSeen
from ray_pipeline.clock import Clock
from ray_pipeline.config import Settings
from ray_pipeline.kafka.read import Record, follow, read_compacted
from ray_pipeline.metrics.expected import surplus

__all__ = ["Observer"]

_log = logging.getLogger(__name__)

_RETRY_S = 0.5
_COMMITS_KEPT = 500
_API_TIMEOUT_S = 2.0


class Observer:
    """Follows progress and job records. Committed ones only, so that it sees what readers see.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        clock: tells the time.
    """

    def __init__(self, settings: Settings, bootstrap: str, clock: Clock) -> None:
        self._settings = settings
        self._bootstrap = bootstrap
        self._clock = clock
        self._lock = threading.Lock()
        self._records: dict[str, dict[str, Any]] = {}
        self._commits: dict[int, deque[int]] = defaultdict(lambda: deque(maxlen=_COMMITS_KEPT))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="chaos-observer", daemon=True)

    def start(self) -> None:
        """Read what there is and begin to follow."""
        settings = self._settings
        for topic in (settings.progress_topic, settings.job_topic):
            for key, value in read_compacted(self._bootstrap, topic).items():
                self._keep(key, value)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def record(self, key: str) -> dict[str, Any]:
        """The newest record of a key, such as ``generator``, ``job``, ``pipeline`` or ``shard/0``; empty before the first."""
        with self._lock:
            return self._records.get(key, {})

    def commits_ms(self, partition: int) -> list[int]:
        """When the last commits of a shard that were seen had begun, epoch milliseconds, ascending."""
        with self._lock:
            return list(self._commits[partition])

    def restarts(self) -> dict[str, int]:
        """How often each part of the run was started again."""
        said = self.record("pipeline").get("restarts", {})
        return {
            "generator actors and shards": int(self.record("generator").get("restarts", 0)),
            **{str(name): int(count) for name, count in said.items()},
            "Spark, by its watchdog": int(self.record("job").get("spark_rebuilds", 0)),
        }

    def sample(self) -> Sample:
        """How the pipeline looks now; asks the API, which takes two seconds at most."""
        api = self._api_answers()
        with self._lock:
            generator, job = self._records.get("generator", {}), self._records.get("job", {})
            shards = {
                int(record["partition"]): ShardSeen(
                    int(record["event_time_ms"] or 0),
                    float(record["epochs"][-1].get("rate", 0.0)),
                    float(record["share"]),
                )
                for key, record in self._records.items()
                if key.startswith("shard/")
            }
        return Sample(
            at_ms=self._clock.now_ms(),
            shards=shards,
            actors_down=sum(not actor["alive"] for actor in generator.get("actors", ())),
            job_state=str(job.get("state", "")),
            executors_missing=max(0, int(job.get("executors_wanted", 0)) - int(job.get("executors", 0))),
            windowed_ms={int(p): int(t["max_event_ms"]) for p, t in job.get("partitions", {}).items()},
            api_answers=api,
        )

    def at_rest(self) -> bool:
        """Whether the generator is paused and the job has read all that the shards have sent."""
        with self._lock:
            partitions = self._records.get("job", {}).get("partitions", {})
            sent = {
                str(r["partition"]): int(r["next_index"]) for k, r in self._records.items() if k.startswith("shard/")
            }
            paused = self._records.get("generator", {}).get("state") == "paused"
        return paused and all(int(partitions.get(p, {}).get("valid", 0)) >= count for p, count in sent.items())

    def disagreements(self) -> dict[int, int]:
        """Records that the job has read beyond what a partition holds by its shard's plan (below 0: too few), where they differ.

        Exact while ratings flow; partitions about which nothing can be said yet are left out.
        """
        with self._lock:
            partitions = self._records.get("job", {}).get("partitions", {})
            shards = {p: self._records.get(f"shard/{p}") for p in partitions}
        found = {}
        for partition, totals in partitions.items():
            shard = shards[partition]
            more = shard and surplus(shard, int(totals["records"]), int(totals["max_event_ms"]))
            if more:
                found[int(partition)] = more
        return found

    # -- the thread

    def _follow(self) -> None:
        topics = [self._settings.progress_topic, self._settings.job_topic]
        while not self._end.is_set():
            try:
                for records in follow(self._bootstrap, topics, False, self._end):
                    for record in records:
                        self._take(record)
            except KafkaException as error:
                _log.info("the observer lost Kafka and tries again: %s", error)
                self._clock.wait(self._end, _RETRY_S)

    def _take(self, record: Record) -> None:
        if record.key is not None and record.value is not None:
            self._keep(record.key, json.loads(record.value))

    def _keep(self, key: str, value: dict[str, Any]) -> None:
        with self._lock:
            self._records["pipeline" if key.startswith("pipeline/") else key] = value
            if key.startswith("shard/"):
                self._commits[int(value["partition"])].append(int(value["committed_ms"]))

    def _api_answers(self) -> bool:
        said = self.record("pipeline")
        if "serve" not in said.get("stages", ()):
            return True  # not served by this pipeline
        url = said["urls"].get("api")
        if url is None:
            return False  # it is just being started again
        try:
            with urllib.request.urlopen(f"{url}/metrics/health", timeout=_API_TIMEOUT_S) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False
