"""What a reader of the pipeline's topics sees: followed on a thread, looked at from another."""

from __future__ import annotations

import logging
import threading
import urllib.error
import urllib.request
from collections import Counter, defaultdict, deque
from typing import Any

from confluent_kafka import KafkaException

from ray_pipeline.chaos.recovery import Sample, ShardSeen
from ray_pipeline.clock import Clock
from ray_pipeline.codec import parse_json, parse_object
from ray_pipeline.config import Settings
from ray_pipeline.errors import BrokerUnavailableError
from ray_pipeline.kafka.read import Record, follow, newest_of_key
from ray_pipeline.metrics.expected import ReadCheck, check_of, surplus
from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.metrics.verdicts import Tally
from ray_pipeline.truth.outside import OutsideRatings

__all__ = ["Observer"]

_log = logging.getLogger(__name__)

_RETRY_S = 0.5
_COMMITS_KEPT = 500
_API_TIMEOUT_S = 2.0
_READ_UP_S = 60.0
_POLL_S = 0.05
_BY_WATCHDOG = "Spark, by its watchdog"


class Observer:
    """Follows what the pipeline publishes. Committed records only, so that it sees what readers see.

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
        self._oracle: dict[str, Any] = {}
        self._outside = OutsideRatings()
        self._store = MetricsStore(())
        self._checks: dict[int, ReadCheck | None] = {}
        self._commits: dict[int, deque[int]] = defaultdict(lambda: deque(maxlen=_COMMITS_KEPT))
        self._next: dict[tuple[str, int], int] = {}
        self._ended: Counter[str] = Counter()
        self._ended_pid = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="chaos-observer", daemon=True)

    def start(self) -> None:
        """Begin to follow; returns when what there is has been read.

        Raises:
            BrokerUnavailableError: it was not within a minute.
        """
        progress = self._settings.progress_topic
        newest = newest_of_key(self._bootstrap, progress, "generator", _READ_UP_S, committed=False)
        there_ms = (parse_object(newest) or {}).get("updated_ms", 0)
        self._thread.start()
        deadline_ms = self._clock.now_ms() + int(_READ_UP_S * 1000)
        while self.record("generator").get("updated_ms", 0) < there_ms:
            if self._clock.now_ms() > deadline_ms:
                raise BrokerUnavailableError(
                    problem=f"topic {progress} could not be read within {_READ_UP_S:.0f} s", fix="Try again"
                )
            self._clock.wait(self._end, _POLL_S)

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
        """How often each part was started again, over all runs of the storm."""
        counts = Counter(self._ended)
        counts.update(self._restarts_of_run())
        return {
            **counts,
            _BY_WATCHDOG: int(self.record("job").get("spark_rebuilds", 0)),
        }  # a run goes on counting these

    def run_ended(self) -> None:
        """Another run goes on where this one was: its counts begin anew."""
        self._ended.update({**self._restarts_of_run(), "the run": 1})
        self._ended_pid = int(self.record("pipeline").get("pid", 0))

    def _restarts_of_run(self) -> Counter[str]:
        said = self.record("pipeline")
        if self._ended_pid and said.get("pid") == self._ended_pid:
            return Counter()
        actors = int(self.record("generator").get("restarts", 0))
        return Counter({"generator actors and shards": actors, **said.get("restarts", {})})

    def sample(self) -> Sample:
        """How the pipeline looks now; asks the API, which takes two seconds at most."""
        api = self._api_answers()
        with self._lock:
            generator, job = self._records.get("generator", {}), self._records.get("job", {})
            verifies = "verify" in self._records.get("pipeline", {}).get("stages", ())
            oracle = self._oracle
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
            job_batch=int(job.get("batch", -1)),
            oracle_batch=int(oracle.get("batch", -1)) if verifies else None,
            oracle_ms=int(oracle["updated_ms"]) if oracle.get("state") == "running" else 0,
        )

    def at_rest(self) -> bool:
        """Whether the generator is paused and the job has read all that the shards have sent."""
        with self._lock:
            job = self._records.get("job", {}).get("partitions", {})
            shards = [record for key, record in self._records.items() if key.startswith("shard/")]
            return self._records.get("generator", {}).get("state") == "paused" and all(
                self._own(str(shard["partition"]), job) >= int(shard["next_index"]) for shard in shards
            )

    def surpluses(self) -> dict[int, int | None]:
        """Records of the shards' own that the job has read beyond what they must be by their plans (below 0: too few), by partition.

        Exact while ratings flow. None where it cannot be told just now: nothing has been read, the shard's progress is still to come,
        or the newest rating is one from outside.
        """
        with self._lock:
            job = self._records.get("job", {}).get("partitions", {})
            shards = [key.removeprefix("shard/") for key in self._records if key.startswith("shard/")]
            return {int(name): self._surplus(name, job) if name in job else None for name in {*job, *shards}}

    def verified(self) -> Tally:
        """How many windows hold what they must, and how many do not."""
        return self._store.tally(self._clock.now_ms())

    # -- inside

    def _own(self, name: str, job: dict[str, Any]) -> int:
        """How many ratings of a partition's shard the job has read: those that are broken on purpose too, none from outside."""
        said = job.get(name, {"records": 0, "next_offset": 0})
        return int(said["records"]) - self._outside.before(int(name), int(said["next_offset"]))

    def _surplus(self, name: str, job: dict[str, Any]) -> int | None:
        partition, newest_ms = int(name), int(job[name]["max_event_ms"])
        shard, own, run = self._records.get(f"shard/{name}"), self._own(name, job), self._records.get("run")
        if run is None or self._outside.newest_ms(partition, int(job[name]["next_offset"])) >= max(newest_ms, 0):
            return None
        if shard is None:
            return own  # nobody has said that they sent anything
        if partition not in self._checks:
            guard_ms = round(self._records.get("windows", {}).get("max_ahead_s", 0.0) * 1000)
            self._checks[partition] = check_of(run["settings"], guard_ms, partition)
        check = self._checks[partition]
        return (check.surplus if check else surplus)(shard, own, newest_ms)

    # -- the thread

    def _follow(self) -> None:
        settings = self._settings
        topics = [
            settings.progress_topic,
            settings.job_topic,
            settings.metrics_topic,
            settings.expected_topic,
            settings.outside_topic,
        ]
        while not self._end.is_set():
            try:
                for records in follow(self._bootstrap, topics, True, self._end, self._next):
                    for record in records:
                        self._next[record.topic, record.partition] = record.offset + 1
                        self._take(record)
            except KafkaException as error:
                _log.info("the observer lost Kafka and tries again: %s", error)
                self._clock.wait(self._end, _RETRY_S)

    def _take(self, record: Record) -> None:
        if record.key is None:
            return
        settings = self._settings
        try:
            if record.topic == settings.metrics_topic:
                self._store.take_window(record.key, record.value)
                return
            if record.topic == settings.expected_topic:
                self._store.take_expected(record.key, record.value, self._clock.now_ms())
            if record.value is not None:
                self._keep(record.topic, record.key, parse_json(record.value))
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # somebody else's: the audit names it
            _log.warning("%s, offset %d, is not understood and passed over: %r", record.topic, record.offset, error)

    def _keep(self, topic: str, key: str, value: dict[str, Any]) -> None:
        settings = self._settings
        with self._lock:
            if topic == settings.outside_topic:
                self._outside.add(value)
            elif topic == settings.expected_topic:
                self._oracle = value if key == "oracle" else self._oracle
            else:
                self._records["pipeline" if key.startswith("pipeline/") else key] = value
                if key in ("run", "windows"):
                    self._checks.clear()
                elif key.startswith("shard/"):
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
