"""The scoreboard on a real broker: learners that read the ratings topic, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ray_pipeline.__main__ import app
from ray_pipeline.clock import SystemClock
from ray_pipeline.config import Settings, load_settings
from ray_pipeline.delivery.factory import open_delivery
from ray_pipeline.generator.coordination import Coordinator
from ray_pipeline.generator.worker import GeneratorWorker, Orders
from ray_pipeline.kafka.client import make_producer
from ray_pipeline.kafka.publish import Publisher
from ray_pipeline.kafka.read import read_compacted, read_topic
from ray_pipeline.kafka.topics import ensure_topics
from ray_pipeline.metrics.store import MetricsStore
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.population import build_movies, build_user_map
from ray_pipeline.serving.feed import Feed
from ray_pipeline.serving.predictions import PredictionQueue, QueueFull
from ray_pipeline.truth.law import RatingLaw
from ray_pipeline.truth.replay import build_models
from ray_pipeline.verification.scoring import ScoreFeed, score_all
from tests.conftest import command, python, wait_for

pytestmark = pytest.mark.timeout(240)

EXAMPLES = Path(__file__).parents[2] / "examples"
RATINGS = 40_000


@pytest.fixture(scope="module")
def run(broker: str) -> Settings:
    """A run in a small dense world that has ended: its settings. Sent as `ray-pipeline generate` does, without Ray."""
    settings = load_settings(
        users=300,
        movies=200,
        partitions=3,
        rate=10_000,
        ratings=RATINGS,
        **{f"{name}_topic": f"scored.{name}" for name in ("ratings", "progress", "predictions", "scores")},
    )
    ensure_topics(settings, broker)
    catalogue, user_map = load_catalogue(settings), build_user_map(settings)
    shares = [user_map.share(p) for p in range(settings.partitions)]
    coordinator = Coordinator(settings, settings.digest(catalogue.digest), shares)
    movies = build_movies(settings, catalogue)
    worker = GeneratorWorker(settings, movies, lambda p: open_delivery(settings, broker, p))

    def finished() -> bool:
        told = coordinator.assignments(SystemClock().now_ms())
        coordinator.observe(list(worker.exchange(Orders({p: told.get(p) for p in range(3)})).shards))
        assert coordinator.totals().failed is None
        return coordinator.started and coordinator.totals().finished

    wait_for("the ratings", finished)
    publisher = Publisher(broker)
    record = {"run": coordinator.run, "config": coordinator.config, "catalogue": catalogue.digest}
    publisher.put(settings.progress_topic, "run", {**record, "settings": settings.event_settings()})
    publisher.close()
    return settings


@pytest.fixture(scope="module")
def feed(run: Settings, broker: str) -> Iterator[ScoreFeed]:
    found = ScoreFeed(run, broker, SystemClock())
    found.start()
    yield found
    found.stop()
    assert found.status()["state"] == "stopped"


def example(name: str, run: Settings, broker: str, *arguments: str) -> str:
    topics = ["--ratings-topic", run.ratings_topic, "--predictions-topic", run.predictions_topic]
    return python(EXAMPLES / name, "--bootstrap-servers", broker, *topics, *arguments, timeout_s=200).stdout


def published(run: Settings, broker: str, model: str) -> dict[str, Any]:
    return read_compacted(broker, run.scores_topic).get(model, {})


def truth_of(settings: Settings, ratings: list[dict[str, Any]]) -> np.ndarray:
    catalogue, user_map = load_catalogue(settings), build_user_map(settings)
    models = build_models(settings, catalogue, range(settings.partitions))
    found = np.empty(len(ratings))
    user_ids = np.array([r["userId"] for r in ratings])
    movie = catalogue.index_of(np.array([r["movieId"] for r in ratings]))
    for p, model in models.items():
        mine = user_map.partition[user_ids - 1] == p
        user = np.searchsorted(model.users.user_ids, user_ids[mine])
        found[mine] = RatingLaw(model.noise_sd).moments(model.score(user, movie[mine])).mean
    return found


def test_the_truth_as_a_predictor_scores_0_and_the_floor(run: Settings, feed: ScoreFeed, broker: str) -> None:
    ratings = [json.loads(r.value or b"") for r in read_topic(broker, run.ratings_topic)]
    assert len(ratings) == RATINGS
    producer = make_producer(broker)
    for rating, stars in zip(ratings, truth_of(run, ratings).tolist(), strict=True):
        fields = {"userId": rating["userId"], "movieId": rating["movieId"], "prediction": stars}
        value = json.dumps({**fields, "timestamp": rating["timestamp"], "model": "truth"})
        producer.produce(run.predictions_topic, value=value.encode())
    producer.produce(run.predictions_topic, value=b"not a prediction")
    assert producer.flush(30) == 0

    found = wait_for("its score", lambda: published(run, broker, "truth").get("predictions") == RATINGS)
    found = published(run, broker, "truth")
    assert found["truth"] == {"rmse": 0.0, "mae": 0.0}
    assert found["observed"]["rmse"] == pytest.approx(found["floor"]["observed"]["rmse"], rel=0.015)
    # some users rate a movie twice in a millisecond: two ratings of one name, of which the first counts
    assert found["matched"] + found["repeated"] == RATINGS and found["unmatched"] == 0
    assert found["coverage"] == pytest.approx(1.0, abs=0.005) and found["delivered"] == RATINGS
    assert feed.status()["rejected"] == {"not JSON": 1} and feed.status()["state"] == "running"


def test_online_factorisation_beats_the_mean_and_then_the_biases(run: Settings, feed: ScoreFeed, broker: str) -> None:
    said = example("online_mf.py", run, broker, "--ratings", str(RATINGS))
    assert f"{RATINGS:,} ratings predicted" in said
    wait_for("its score", lambda: published(run, broker, "online-mf").get("predictions") == RATINGS)
    found = published(run, broker, "online-mf")
    for against in ("observed", "truth"):
        errors = [found[name][against]["rmse"] for name in ("floor", "bias_only", "global_mean")]
        assert errors[0] < found[against]["rmse"] < errors[1] < errors[2], found


def test_als_beats_the_biases_on_what_it_has_not_seen(run: Settings, feed: ScoreFeed, broker: str) -> None:
    example("spark_als.py", run, broker)
    wait_for("its score", lambda: published(run, broker, "spark-als").get("scored", 0) > 0.19 * RATINGS)
    found = published(run, broker, "spark-als")
    for against in ("observed", "truth"):
        errors = [found[name][against]["rmse"] for name in ("floor", "bias_only", "global_mean")]
        assert errors[0] < found[against]["rmse"] < 0.9 * errors[1] < errors[2], found
    assert found["coverage"] > 0.99 and found["unmatched"] == 0  # of what came after the cut


def test_a_restarted_feed_and_the_command_come_to_the_same_scores(run: Settings, feed: ScoreFeed, broker: str) -> None:
    def scores(found: dict[str, Any]) -> dict[str, Any]:
        return {model["model"]: {k: v for k, v in model.items() if k != "updated_ms"} for model in found["models"]}

    recomputed = score_all(run, broker)
    before = {key: value for key, value in read_compacted(broker, run.scores_topic).items() if key}
    assert scores(recomputed) == scores({"models": list(before.values())})
    assert (recomputed["state"], recomputed["reason"]) == ("running", "")
    topics = ["--progress-topic", run.progress_topic, "--predictions-topic", run.predictions_topic]
    arguments = ["scoreboard", "--bootstrap-servers", broker, *topics]
    done = CliRunner().invoke(app, [*arguments, "--json"], env={"RAY_PIPELINE_SCORES_TOPIC": run.scores_topic})
    assert done.exit_code == 0 and json.loads(done.stdout) == recomputed, done.output
    table = CliRunner().invoke(app, arguments).stdout
    assert "truth" in table and "best possible" in table and "rejected: 1 × not JSON" in table


def test_posted_predictions_reach_the_scoreboard_and_scores_the_store(
    run: Settings, feed: ScoreFeed, broker: str
) -> None:
    queue = PredictionQueue(run, broker)
    queue.put([("posted", 1, 2, 3.0, 1_700_000_000_000)] * 3)  # long before the run
    queue.close()
    store = MetricsStore(("tumbling_1min",))
    reader = Feed(run, broker, store, SystemClock())
    reader.start()
    try:
        wait_for("its score", lambda: "posted" in [m["model"] for m in store.scores()["models"]])
    finally:
        reader.stop()
    found = {model["model"]: model for model in store.scores()["models"]}["posted"]
    assert (found["scored"], found["matched"], found["unmatched"], queue.lost) == (3, 0, 3, 0)
    assert store.scores()["models"][-1]["model"] == "posted" and store.scores()["rejected"] == {"not JSON": 1}


def test_a_queue_that_the_broker_does_not_empty_is_full_at_some_time(run: Settings) -> None:
    queue = PredictionQueue(run, "127.0.0.1:1")
    queue.put([("posted", 1, 2, 3.0, 1_700_000_000_000)] * 50_000)
    with pytest.raises(QueueFull, match="50,000"):
        queue.put([("posted", 1, 2, 3.0, 1_700_000_000_000)])
    assert queue.waiting() == 50_000
    queue.close(0.1)


def test_a_feed_without_a_run_waits_and_says_so(broker: str) -> None:
    settings = load_settings(
        **{f"{name}_topic": f"empty.{name}" for name in ("ratings", "progress", "predictions", "scores")}
    )
    ensure_topics(settings, broker)
    waiting = ScoreFeed(settings, broker, SystemClock())
    waiting.start()
    wait_for("the reason", lambda: "no run has started" in waiting.status()["reason"], 20)
    assert waiting.status()["state"] == "waiting"
    waiting.stop()
    assert waiting.status()["state"] == "stopped"
    done = command("scoreboard", "--bootstrap-servers", broker, "--progress-topic", settings.progress_topic)
    assert done.returncode == 2 and "has no record of a run" in done.stderr
