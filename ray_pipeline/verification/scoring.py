"""The scoreboard's feed: topic ``predictions`` in, topic ``predictions.scores`` out.

Scores are recomputed from the topic's beginning at every start, so they need no state of their own and a restart changes none.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

from confluent_kafka import KafkaException

from ray_pipeline.clock import Clock
from ray_pipeline.codec import parse_object
from ray_pipeline.config import Settings
from ray_pipeline.errors import BrokerUnavailableError, RayPipelineError, RecordError, UncheckedError
from ray_pipeline.kafka.publish import Publisher
from ray_pipeline.kafka.read import Record, follow, newest_of_key, read_topic
from ray_pipeline.kafka.topics import partitions_of
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.population import build_user_map
from ray_pipeline.restart import Decision, RestartPolicy
from ray_pipeline.truth.replay import ProgressRecords, build_models
from ray_pipeline.truth.scoring import Scoreboard
from ray_pipeline.verification.audit import PublishedRun, published_run

__all__ = ["ScoreFeed", "open_scoreboard", "score_all"]

_log = logging.getLogger(__name__)

_NO_RUN_S = 1.0
_ANSWER_S = 15.0
_PUBLISH_MS = 1_000
_AT_ONCE = 20_000


def open_scoreboard(run: PublishedRun) -> Scoreboard:
    """A scoreboard for a run, with the progress of its shards.

    Args:
        run: what it published.
    """
    settings = run.settings
    models = build_models(settings, load_catalogue(settings), range(settings.partitions))
    user_map = build_user_map(settings)
    shares = [user_map.share(p) for p in range(settings.partitions)]
    board = Scoreboard(settings, models, shares, str(run.run["run"]), str(run.run["config"]))
    for progress in run.progress.values():
        board.progress(progress)
    return board


def score_all(settings: Settings, bootstrap: str) -> dict[str, Any]:
    """Score everything that is in topic ``predictions`` now. Blocks; reads about 100,000 predictions a second.

    Returns:
        ``models``: a record each, as in topic ``predictions.scores``; with the totals over all; ``state`` and ``reason``: what
        the run's feed last said of itself, None where it has said nothing.

    Raises:
        BrokerUnavailableError: the topics cannot be read.
        UncheckedError: there is no run.
        StateMismatchError: its catalogue is another one.
    """
    run = published_run(settings, bootstrap)
    board = open_scoreboard(run)
    values: list[bytes | None] = []
    for record in read_topic(bootstrap, settings.predictions_topic):
        values.append(record.value)
        if len(values) >= _AT_ONCE:
            board.take(values, 0)
            board.settle(0)
            values.clear()
    board.take(values, 0)
    # what was predicted meanwhile was delivered before: this progress has reached it
    records = ProgressRecords(run.settings, run.run)
    for progress in published_run(settings, bootstrap).progress.values():
        if not records.untrue(progress):  # another run may have begun
            board.progress(progress)
    board.settle(None)
    return {"models": board.scores(), **board.totals(), **_said_by_feed(settings, bootstrap, str(run.run["run"]))}


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
        """Say so where those look who would rely on it."""
        _log.error("no scores any more: %s", reason)
        self._state, self._reason = "failed", reason
        publisher = Publisher(self._bootstrap)
        publisher.put(self._settings.scores_topic, "", {**self._totals_record(), "updated_ms": self._clock.now_ms()})
        publisher.close()

    def _follow(self) -> None:
        settings = self._settings
        try:
            run = published_run(settings, self._bootstrap)
        except UncheckedError as error:
            self._wait(f"no run has started: {error.problem}", _NO_RUN_S)
            return
        board, progress = open_scoreboard(run), ProgressRecords(run.settings, run.run)
        self._state, self._reason = "running", ""
        self._published.clear()
        topics = [settings.progress_topic, settings.predictions_topic]
        publisher = Publisher(self._bootstrap)
        try:
            for records in follow(self._bootstrap, topics, True, self._end):
                self._take(board, progress, records)
                self._publish(board, publisher, False)
            self._state = "stopped"
            self._publish(board, publisher, True)
        finally:
            publisher.close()

    def _take(self, board: Scoreboard, progress: ProgressRecords, records: Iterable[Record]) -> None:
        predictions = []
        for record in records:
            if record.topic == self._settings.predictions_topic:
                predictions.append(record.value)
            elif record.key is not None and record.key.startswith("shard/"):
                try:
                    board.progress(progress.read(record.key, parse_object(record.value)))
                except RecordError as error:  # somebody else's record must not end the scoreboard, nor count
                    _log.warning("%s, offset %d, is passed over: %s", record.topic, record.offset, error.problem)
        now_ms = self._clock.now_ms()
        board.take(predictions, now_ms)
        board.settle(now_ms)

    def _totals_record(self) -> dict[str, Any]:
        """The topic as a whole, and how the feed stands."""
        return {"records": 0, "rejected": {}, **self._totals, "state": self._state, "reason": self._reason}

    def _publish(self, board: Scoreboard, publisher: Publisher, at_once: bool) -> None:
        now_ms = self._clock.now_ms()
        if now_ms - self._published_ms < _PUBLISH_MS and not at_once:
            return
        self._published_ms = now_ms
        self._totals = board.totals()
        records = {record["model"]: record for record in board.scores()}
        records[""] = self._totals_record()  # no model has an empty name
        for key, record in records.items():
            if self._published.get(key) != record:
                self._published[key] = record
                publisher.put(self._settings.scores_topic, key, {**record, "updated_ms": now_ms})


def _said_by_feed(settings: Settings, bootstrap: str, run: str) -> dict[str, Any]:
    """``state`` and ``reason`` of a run's feed; None where it has not said anything, or the topic is another run's."""
    topic = settings.scores_topic
    there = partitions_of(bootstrap, [topic])
    said = parse_object(newest_of_key(bootstrap, topic, "", _ANSWER_S, committed=False)) if there else None
    if said is None or said.get("run") != run:
        said = {}
    return {name: said.get(name) for name in ("state", "reason")}
