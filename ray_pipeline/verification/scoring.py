"""The scoreboard's feed: topic ``predictions`` in, topic ``predictions.scores`` out.

Scores are recomputed from the topic's beginning at every start, so they need no state of their own and a restart changes none.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from confluent_kafka import KafkaException

from ray_pipeline.clock import Clock
from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.errors import BrokerUnavailableError, RayPipelineError, UncheckedError
from ray_pipeline.kafka.publish import Publisher
from ray_pipeline.kafka.read import Record, follow, read_topic
from ray_pipeline.model.population import build_user_map
from ray_pipeline.restart import Decision, RestartPolicy
from ray_pipeline.truth.replay import build_models, published_catalogue, published_settings
from ray_pipeline.truth.scoring import Scoreboard

__all__ = ["ScoreFeed", "open_scoreboard", "score_all"]

_log = logging.getLogger(__name__)

_NO_RUN_S = 1.0
_PUBLISH_MS = 1_000
_AT_ONCE = 20_000


def open_scoreboard(settings: Settings, published: Mapping[str, bytes]) -> Scoreboard:
    """A scoreboard for the run that topic ``ratings.progress`` tells of.

    Args:
        settings: one's own; the event settings are the run's.
        published: the topic's newest value of each key.

    Raises:
        UncheckedError: no run has said what it is.
        StateMismatchError: the run's catalogue is another one.
    """
    try:
        run = json.loads(published.get("run", b""))
    except ValueError:
        raise UncheckedError(
            problem=f"topic {settings.progress_topic} does not say which run the ratings are of",
            fix="Start ray-pipeline run or generate first",
        ) from None
    catalogue = published_catalogue(settings, run)
    found = published_settings(settings, run, catalogue)
    models = build_models(found, catalogue, range(found.partitions))
    user_map = build_user_map(found)
    shares = [user_map.share(p) for p in range(found.partitions)]
    board = Scoreboard(found, models, shares, str(run["run"]), str(run["config"]))
    for key, value in published.items():
        _progress(board, key, value)
    return board


def score_all(settings: Settings, bootstrap: str) -> dict[str, Any]:
    """Score everything that is in topic ``predictions`` now. Blocks; reads about 100,000 predictions a second.

    Returns:
        ``models``: a record each, as in topic ``predictions.scores``; with the totals over all.

    Raises:
        BrokerUnavailableError: the topics cannot be read.
        UncheckedError: there is no run.
        StateMismatchError: its catalogue is another one.
    """
    board = open_scoreboard(settings, _newest(bootstrap, settings.progress_topic))
    values: list[bytes | None] = []
    for record in read_topic(bootstrap, settings.predictions_topic):
        values.append(record.value)
        if len(values) >= _AT_ONCE:
            board.take(values, 0)
            board.settle(0)
            values.clear()
    board.take(values, 0)
    # what was predicted meanwhile was delivered before: this progress has reached it
    for key, value in _newest(bootstrap, settings.progress_topic).items():
        _progress(board, key, value)
    board.settle(None)
    return {"models": board.scores(), **board.totals()}


class ScoreFeed:
    """One thread that follows predictions and progress and publishes each model's score, at most once a second.

    When Kafka is away it begins again, unless that happens too often.

    Args:
        settings: all settings.
        bootstrap: brokers, HOST:PORT[,…].
        clock: tells the time.
    """

    def __init__(self, settings: Settings, bootstrap: str, clock: Clock) -> None:
        self._settings = settings
        self._bootstrap = bootstrap
        self._clock = clock
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scores", daemon=True)
        self._policy = RestartPolicy()
        self._state, self._reason = "starting", ""
        self._totals: dict[str, Any] = {}
        self._published: dict[str, dict[str, Any]] = {}
        self._published_ms = 0

    def start(self) -> None:
        """Begin to follow; returns at once."""
        self._thread.start()

    def stop(self, deadline_s: float = 15.0) -> None:
        """Publish what changed, and end."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(deadline_s)

    def status(self) -> dict[str, Any]:
        """``state``: starting, waiting (for a run, or for Kafka), running, failed, stopped; ``reason``; the totals."""
        return {"state": self._state, "reason": self._reason, **self._totals}

    # -- the thread

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                self._follow()
            except (KafkaException, BrokerUnavailableError) as error:
                if self._policy.failed(self._clock.now_ms()) is Decision.GIVE_UP:
                    self._fail(f"Kafka is away: {error}")
                    return
                self._wait(f"Kafka is away: {error}", self._policy.backoff_s)
            except RayPipelineError as error:  # to try again would not help
                self._fail(str(error))
                return
            except Exception as error:  # noqa: BLE001 - the thread's last line: reported, and shown as failed
                _log.exception("the scoreboard failed")
                self._fail(f"{type(error).__name__}: {error}")
                return
        self._state, self._reason = "stopped", ""

    def _wait(self, reason: str, seconds: float) -> None:
        if reason != self._reason:
            _log.warning("the scoreboard waits: %s", reason)
        self._state, self._reason = "waiting", reason
        self._clock.wait(self._end, seconds)

    def _fail(self, reason: str) -> None:
        _log.error("no scores any more: %s", reason)
        self._state, self._reason = "failed", reason

    def _follow(self) -> None:
        settings = self._settings
        published = _newest(self._bootstrap, settings.progress_topic)
        if "run" not in published:
            self._wait(f"no run has started: topic {settings.progress_topic} names none", _NO_RUN_S)
            return
        board = open_scoreboard(settings, published)
        self._state, self._reason = "running", ""
        self._published.clear()
        topics = [settings.progress_topic, settings.predictions_topic]
        publisher = Publisher(self._bootstrap)
        try:
            for records in follow(self._bootstrap, topics, True, self._end):
                self._take(board, records)
                self._publish(board, publisher, False)
            self._publish(board, publisher, True)
        finally:
            publisher.close()

    def _take(self, board: Scoreboard, records: Iterable[Record]) -> None:
        predictions = []
        for record in records:
            if record.topic == self._settings.predictions_topic:
                predictions.append(record.value)
            elif record.key is not None and record.value is not None:
                _progress(board, record.key, record.value)
        now_ms = self._clock.now_ms()
        board.take(predictions, now_ms)
        board.settle(now_ms)

    def _publish(self, board: Scoreboard, publisher: Publisher, at_once: bool) -> None:
        now_ms = self._clock.now_ms()
        if now_ms - self._published_ms < _PUBLISH_MS and not at_once:
            return
        self._published_ms = now_ms
        self._totals = board.totals()
        records = {record["model"]: record for record in board.scores()}
        if self._totals["records"]:
            records[""] = self._totals  # no model has an empty name: the topic as a whole
        for key, record in records.items():
            if self._published.get(key) != record:
                self._published[key] = record
                publisher.put(self._settings.scores_topic, key, {**record, "updated_ms": now_ms})


def _newest(bootstrap: str, topic: str) -> dict[str, bytes]:
    """The newest value of each key of a compacted topic."""
    return {r.key: r.value for r in read_topic(bootstrap, topic) if r.key is not None and r.value is not None}


def _progress(board: Scoreboard, key: str, value: bytes) -> None:
    """Hand a record of topic ``ratings.progress`` on, if it is a shard's."""
    if not key.startswith("shard/"):
        return
    try:
        board.progress(ShardProgress.from_json(value))
    except ValueError as error:  # somebody else's record must not end the scoreboard
        _log.warning("record %s of the progress topic is not understood and passed over: %r", key, error)
