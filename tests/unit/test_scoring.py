"""The scoreboard's core against the model itself: law, lookup, baselines, and what is counted how."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_pipeline.config import Settings, load_settings
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.events import EventBatch, Fault
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.population import Habits, build_user_map
from ray_pipeline.model.ratings import to_half_stars
from ray_pipeline.model.streams import normal_table
from ray_pipeline.truth import scoring, validity
from ray_pipeline.truth.law import BiasOnly, RatingLaw, probabilities
from ray_pipeline.truth.lookup import find_ratings
from ray_pipeline.truth.replay import ShardReplay, build_models
from ray_pipeline.truth.scoring import InvalidPrediction, Scoreboard, parse_record

START_MS = 1_700_000_000_000


class World:
    """A run as its progress tells of it, and its ratings."""

    def __init__(self, rate: float, total: int, **changes: Any) -> None:
        self.settings: Settings = load_settings(**changes)
        self.models = build_models(self.settings, load_catalogue(self.settings), range(self.settings.partitions))
        user_map = build_user_map(self.settings)
        self.shares = [user_map.share(p) for p in range(self.settings.partitions)]
        # a change of rate in between: indexes are not proportional to time
        epochs = (Epoch(START_MS, rate), Epoch(START_MS + round(total / rate * 250), rate * 2))
        self.progress: list[ShardProgress] = []
        self.ratings: list[EventBatch] = []
        for p, share in enumerate(self.shares):
            progress = ShardProgress("run", "c", p, 0, None, 0, epochs, share, (p + 0.5) / len(self.shares))
            replay = ShardReplay(self.models[p], progress)
            ratings = replay.events(0, round(total * share))
            self.ratings.append(ratings)
            last_ms = replay.due_ms(len(ratings) - 1)
            self.progress.append(ShardProgress("run", "c", p, len(ratings), last_ms, 0, epochs, share, progress.phase))

    def board(self) -> Scoreboard:
        board = Scoreboard(self.settings, self.models, self.shares, "run", "c")
        for progress in self.progress:
            board.progress(progress)
        return board

    def truth(self, ratings: EventBatch) -> np.ndarray:
        model = self.models[ratings.partition]
        user = np.searchsorted(model.users.user_ids, ratings.user_ids)
        movie = np.searchsorted(model.movies.movie_ids, ratings.movie_ids)
        scores = model.score_at(user, movie, ratings.first_index + np.arange(len(ratings)))
        return RatingLaw(model.noise_sd).moments(scores, model.users.habits.of(user)).mean

    def records(self, predict: Callable[[EventBatch], np.ndarray], model: str = "m") -> list[bytes]:
        """Predictions of all ratings."""
        return [
            record(int(u), int(m), float(stars), int(t), model)
            for r in self.ratings
            for u, m, stars, t in zip(r.user_ids, r.movie_ids, predict(r), r.timestamps_ms, strict=True)
        ]


def record(user: int, movie: int, stars: float, time_ms: int, model: str = "m") -> bytes:
    fields = {"userId": user, "movieId": movie, "prediction": stars, "timestamp": time_ms, "model": model}
    return json.dumps(fields).encode()


def score(board: Scoreboard, values: list[bytes], batch: int = 5_000) -> dict[str, Any]:
    for lo in range(0, len(values), batch):
        board.take(values[lo : lo + batch], 0)
        board.settle(0)
    (found,) = board.scores()
    return found


@pytest.fixture(scope="module")
def world() -> World:
    """The default model: 138,493 users, 27,278 movies."""
    return World(1_000.0, 40_000)


@pytest.fixture(scope="module")
def small() -> World:
    return World(50.0, 3_000, users=300, movies=200)


# -- the law


@given(score=st.floats(-3, 9, width=32), noise_sd=st.sampled_from([0.0, 0.003, 0.6, 1.5]))
@settings(max_examples=60, deadline=None)
def test_the_law_is_that_of_the_model_to_the_last_noise(score: float, noise_sd: float) -> None:
    sd = np.float32(noise_sd)
    moments = RatingLaw(sd).moments(np.array([score], np.float32))
    drawn = to_half_stars(np.float32(score) + sd * normal_table()).astype(np.float64) / 2
    assert moments.mean[0] == drawn.mean()
    assert moments.variance[0] == pytest.approx(drawn.var(), abs=1e-12)
    assert moments.deviation[0] == pytest.approx(np.abs(drawn - np.median(drawn)).mean(), abs=1e-12)


def test_edges_belong_to_the_side_that_float32_puts_them() -> None:
    scores = np.array([e + d for e in np.arange(0.75, 5, 0.5) for d in (-1e-7, -6e-8, 0.0, 6e-8, 1e-7)], np.float32)
    assert (RatingLaw(np.float32(0)).moments(scores).mean == to_half_stars(scores) / 2).all()


def test_the_mean_is_what_the_model_draws_for_a_pair(small: World) -> None:
    model = small.models[0]
    drawn = model.draw(0, 400_000)
    pairs, pair, count = np.unique(
        np.stack([drawn.user_ids, drawn.movie_ids]), axis=1, return_inverse=True, return_counts=True
    )
    user = np.searchsorted(model.users.user_ids, pairs[0])
    movie = np.searchsorted(model.movies.movie_ids, pairs[1])
    expected = RatingLaw(model.noise_sd).moments(model.score(user, movie))
    means = np.bincount(pair.ravel(), drawn.half_stars / 2) / count
    often = (count >= 100) & (expected.variance > 0.05)
    off = (means - expected.mean)[often] / np.sqrt(expected.variance / count)[often]
    assert often.sum() > 500 and abs(off.mean()) < 0.15 and off.std() == pytest.approx(1.0, abs=0.1)


def test_probabilities_of_an_alias_table_are_its_weights(small: World) -> None:
    movies = small.models[0].movies
    drawn = np.searchsorted(movies.movie_ids, small.models[0].draw(0, 500_000).movie_ids)
    law = probabilities(movies.popularity)
    assert law.sum() == pytest.approx(1.0)
    assert np.abs(np.bincount(drawn, minlength=len(law)) / len(drawn) - law).max() < 0.002


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank": 1},
        {"factor_share": 0.0},
        {"factor_share": 0.65},
        {"whole_star_share": 1.0},
        {"whole_star_share": 0.4},
        {"genre_share": 0.8},
        {"session_length": 7.0},
    ],
)
def test_no_additive_fit_beats_the_biases_line(changes: dict[str, Any]) -> None:
    """The best additive prediction, fitted to the truth of as many ratings as one likes, comes close and no further."""
    world = World(50.0, 400, users=120, movies=150, partitions=1, actors=1, popularity_exponent=0.5, **changes)
    model = world.models[0]
    drawn = model.draw(0, 60_000)
    user = np.searchsorted(model.users.user_ids, drawn.user_ids)
    movie = np.searchsorted(model.movies.movie_ids, drawn.movie_ids)
    truth = RatingLaw(model.noise_sd).moments(model.score(user, movie), model.users.habits.of(user)).mean
    line = rms(BiasOnly([model], [1.0]).predict(model, user, movie) - truth)
    by_user, by_movie = np.full(120, truth.mean()), np.zeros(150)
    for _ in range(20):
        by_user = np.bincount(user, truth - by_movie[movie], 120) / np.maximum(np.bincount(user, minlength=120), 1)
        by_movie = np.bincount(movie, truth - by_user[user], 150) / np.maximum(np.bincount(movie, minlength=150), 1)
    fitted = rms(by_user[user] + by_movie[movie] - truth)
    assert (
        line < 1.02 * fitted
    )  # without factors it is far better: it knows that the scale ends at half a star and at five
    assert line > 0.95 * fitted or changes.get("factor_share") == 0.0


def rms(errors: np.ndarray) -> float:
    return math.sqrt(float((errors**2).mean()))


# -- the lookup


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_ratings_are_found_by_name_wherever_they_lie(small: World, data: st.DataObject) -> None:
    progress, ratings = small.progress[1], small.ratings[1]
    replay = ShardReplay(small.models[1], progress)
    chosen = np.array(data.draw(st.lists(st.integers(0, len(ratings) - 1), min_size=1, max_size=40)), np.int64)
    shifted = np.array(data.draw(st.lists(st.integers(-1, 1), min_size=len(chosen), max_size=len(chosen))), np.int64)
    user, movie, time = ratings.user_ids[chosen], ratings.movie_ids[chosen], ratings.timestamps_ms[chosen] + shifted
    index, half_stars = find_ratings(replay, user, movie, time)
    for n in range(len(chosen)):
        same = (ratings.user_ids == user[n]) & (ratings.movie_ids == movie[n]) & (ratings.timestamps_ms == time[n])
        first = int(np.argmax(same)) if same.any() else -1
        assert index[n] == first and half_stars[n] == (ratings.half_stars[first] if first >= 0 else 0)


def test_of_two_ratings_of_one_name_the_first_is_meant() -> None:
    world = World(1e6, 20_000, users=4, movies=3, partitions=1, actors=1)  # a thousand a millisecond
    ratings = world.ratings[0]
    replay = ShardReplay(world.models[0], world.progress[0])
    index, _ = find_ratings(replay, ratings.user_ids, ratings.movie_ids, ratings.timestamps_ms)
    names = np.stack([ratings.user_ids, ratings.movie_ids, ratings.timestamps_ms])
    _, first, inverse = np.unique(names, axis=1, return_index=True, return_inverse=True)
    assert (index == first[inverse.ravel()]).all() and len(first) < len(ratings)


def test_first_at_agrees_with_the_times(small: World) -> None:
    replay, ratings = ShardReplay(small.models[0], small.progress[0]), small.ratings[0]
    asked = np.concatenate([ratings.timestamps_ms, ratings.timestamps_ms + 1, [START_MS - 5_000, START_MS]])
    within = asked <= ratings.timestamps_ms[-1]
    assert (replay.first_at(asked) == np.searchsorted(ratings.timestamps_ms, asked))[within].all()
    assert len(replay.first_at(np.empty(0, np.int64))) == 0


# -- scores


def test_the_truth_scores_0_against_the_truth_and_the_floor_against_what_was_observed(world: World) -> None:
    found = score(world.board(), world.records(world.truth))
    total = sum(len(r) for r in world.ratings)
    assert found["matched"] == found["scored"] == found["predictions"] == total and found["unmatched"] == 0
    assert found["coverage"] == 1.0 and found["delivered"] == total and found["waiting"] == 0
    assert found["truth"] == {"rmse": 0.0, "mae": 0.0} == found["floor"]["truth"]
    assert found["observed"]["rmse"] == pytest.approx(found["floor"]["observed"]["rmse"], rel=0.02)
    assert found["observed"]["mae"] >= 0.98 * found["floor"]["observed"]["mae"]


WORKLOADS: dict[str, dict[str, Any]] = {
    "genres": {"genre_share": 0.7},
    "scales": {"user_scale_sigma": 0.5},
    "whole stars": {"whole_star_share": 0.4},
    "whole stars alone": {"whole_star_share": 1.0},
    "taste": {"taste_exposure": 1.0},
    "sessions": {"session_length": 9.0},
    "arrivals": {"new_user_share": 0.5, "new_movie_share": 0.5, "arrival_ratings": 12_000},
    "drift": {"drift": ["gradual from=0 to=10000 size=-1.5", "recurring period=5000 size=2 genre=Drama"]},
    "attack": {"attack": ["review-bomb movie=18 at=2000 ratings=2000 stealth=0.4 intensity=0.2"]},
}
WORKLOADS["all"] = {name: value for changes in WORKLOADS.values() for name, value in changes.items()}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_truth_and_floor_are_right_under_every_workload(workload: str) -> None:
    """Who knows the truth makes no error against it, and against what was observed just as much as the floor says."""
    changes = WORKLOADS[workload]
    world = World(1_000.0, 15_000, users=3_000, movies=800, **changes)
    found = score(world.board(), world.records(world.truth))
    hits = sum(int(world.models[r.partition].hits(np.arange(len(r))).sum()) for r in world.ratings)
    assert found["attacked"] == pytest.approx(hits, rel=0.01) and (hits > 1_000) is ("attack" in changes)
    assert found["scored"] + found["attacked"] + found["repeated"] == found["predictions"] and found["unmatched"] == 0
    assert found["coverage"] == pytest.approx(1.0, abs=0.02)
    assert found["truth"] == {"rmse": 0.0, "mae": 0.0} == found["floor"]["truth"]
    assert found["observed"]["rmse"] == pytest.approx(found["floor"]["observed"]["rmse"], rel=0.015)
    assert found["observed"]["mae"] >= 0.99 * found["floor"]["observed"]["mae"]
    line = [found[name]["truth"]["rmse"] for name in ("floor", "bias_only", "global_mean")]
    assert line[0] < line[1] < line[2]
    assert set(found["bias_only"]["inexact_by"]) == set(changes) & {
        "taste_exposure",
        "new_user_share",
        "new_movie_share",
        "attack",
    }


@given(score=st.floats(-3, 9, width=32), scale=st.sampled_from([0.3, 1.0, 2.5]), whole=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_law_with_scales_and_whole_stars(score: float, scale: float, whole: bool) -> None:
    sd, scales = np.float32(0.6), np.array([scale], np.float32)
    law, habits = RatingLaw(sd), Habits(scales, np.array([whole]))
    moments = law.moments(np.array([score], np.float32), habits)
    given = np.float32(score) + sd * normal_table() * scales
    drawn = to_half_stars(given, np.full(len(given), whole)).astype(np.float64) / 2
    reach = [(drawn >= level / 2).mean() for level in range(2, 11)]
    assert law.at_least(np.array([score], np.float32), habits)[0] == pytest.approx(reach, abs=1 / 65_536)
    # a noise of 65,536 may fall to the other side of each edge
    assert moments.mean[0] == pytest.approx(drawn.mean(), abs=9 / 65_536)
    assert moments.variance[0] == pytest.approx(drawn.var(), abs=1e-3)
    assert moments.deviation[0] == pytest.approx(np.abs(drawn - np.median(drawn)).mean(), abs=1e-3)


def test_predictions_without_a_rating_are_judged_by_the_drift_of_their_time() -> None:
    world = World(1_000.0, 4_000, users=300, movies=200, partitions=1, actors=1, drift=["abrupt at=2000 size=-2"])
    ratings, board = world.ratings[0], world.board()
    user, movie = int(ratings.user_ids[0]), int(ratings.movie_ids[0])
    board.take(
        [record(user, movie, 0.0, int(t), str(t)) for t in (START_MS - 1, ratings.timestamps_ms[-1] + 60_000)], 0
    )
    board.settle(None)
    before, after = (found["truth"]["mae"] for found in board.scores())
    assert before > after + 0.8


def test_floor_then_biases_then_global_mean(world: World) -> None:
    found = score(world.board(), world.records(lambda r: np.full(len(r), 3.5)))
    for kind in ("rmse", "mae"):
        for against in ("observed", "truth"):
            line = [found[name][against][kind] for name in ("floor", "bias_only", "global_mean")]
            assert line[0] < 0.8 * line[1] and line[1] < 0.9 * line[2], line
    # noise, and noise with factors, as shares of the variance of the raw score: 0.3 and 0.65 of 1.1 stars; clipping takes some
    assert 0.55 < found["floor"]["observed"]["rmse"] < 1.1 * math.sqrt(0.3)
    assert 0.80 < found["bias_only"]["observed"]["rmse"] < 1.1 * math.sqrt(0.65)
    assert found["observed"]["rmse"] >= found["global_mean"]["observed"]["rmse"]
    observed = np.concatenate([r.half_stars for r in world.ratings]) / 2
    assert found["global_mean"]["value"] == pytest.approx(observed.mean(), abs=0.02)
    constant = rms(observed - found["global_mean"]["value"])
    assert found["global_mean"]["observed"]["rmse"] == pytest.approx(constant, abs=1e-5)
    assert found["observed"]["mae"] == pytest.approx(np.abs(observed - 3.5).mean(), abs=1e-5)


def test_how_predictions_are_cut_into_batches_changes_nothing(small: World) -> None:
    values = small.records(small.truth)
    shuffled = [values[i] for i in np.random.default_rng(1).permutation(len(values))]
    whole = score(small.board(), values)
    assert score(small.board(), shuffled, 37) == whole == score(small.board(), values, 1_000)


def test_a_repeat_counts_once_the_first_one(small: World) -> None:
    good, bad = small.records(small.truth), small.records(lambda r: np.full(len(r), 99.0))
    once, again = score(small.board(), good), score(small.board(), good + bad)
    assert again["repeated"] == once["repeated"] + len(bad) and again["predictions"] == 2 * len(good)
    same = ("matched", "scored", "truth", "observed", "coverage")
    assert [again[name] for name in same] == [once[name] for name in same]


def test_a_repeat_is_recognised_within_one_batch_too_and_by_each_model_alone(small: World) -> None:
    first = small.records(small.truth)[0]
    other = first.replace(b'"m"', b'"other"')
    board = small.board()
    board.take([first, other, first, first], 0)
    board.settle(0)
    mine, others = board.scores()
    assert (mine["matched"], mine["repeated"]) == (1, 2) and (others["matched"], others["repeated"]) == (1, 0)


def test_beyond_the_bound_the_oldest_stretch_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "SEEN_CHUNKS", 2)
    seen = scoring._Seen()
    one, far = np.array([5], np.int64), np.array([5 + 65_536], np.int64)
    assert seen.add(0, one).all() and seen.add(0, far).all() and not seen.add(0, one).any()
    assert seen.add(1, one).all()  # the stretch of `far` was used longest ago
    assert not seen.add(0, one).any() and seen.add(0, far).all()


def test_what_names_no_rating_is_scored_against_the_truth_alone(small: World) -> None:
    board, ratings = small.board(), small.ratings[0]
    truth, time_ms = small.truth(ratings), int(ratings.timestamps_ms[0])
    user, movie = int(ratings.user_ids[0]), int(ratings.movie_ids[0])
    board.take([record(user, movie, float(truth[0]) + 1.0, time_ms - 1)] * 2, 0)  # before the stream's first instant
    board.settle(0)
    (found,) = board.scores()
    assert (found["scored"], found["matched"], found["unmatched"], found["coverage"]) == (2, 0, 2, 0.0)
    assert found["truth"] == {"rmse": 1.0, "mae": 1.0}
    assert found["observed"] == {"rmse": None, "mae": None} == found["bias_only"]["observed"]
    assert found["first_event_ms"] is None


def test_coverage_is_of_what_was_delivered_since_the_first_predicted_rating(small: World) -> None:
    times = np.sort(np.concatenate([r.timestamps_ms for r in small.ratings]))
    middle = int(times[len(times) // 2])
    late = [v for v in small.records(small.truth) if json.loads(v)["timestamp"] >= middle]
    some = late[::2]
    first = min(json.loads(v)["timestamp"] for v in some)
    found = score(small.board(), some)
    assert found["first_event_ms"] == first >= middle and found["delivered"] == (times >= first).sum()
    assert found["coverage"] == pytest.approx(0.5, abs=0.01)


SPOILT: dict[str, Any] = {
    "duplicate_share": 0.2,
    "duplicate_distance": 30,
    "malformed_share": 0.1,
    "out_of_range_share": 0.05,
    "tombstone_share": 0.05,
    "unknown_field_share": 0.05,
    "late_share": 0.1,
    "late_mean_s": 2.0,
    "late_max_s": 5.0,
}


def readable(world: World) -> list[tuple[int, bytes]]:
    """Event time and prediction of each rating that can be read and repeats none, of all partitions."""
    found = []
    for ratings in world.ratings:
        assert ratings.faults is not None
        fresh = (ratings.faults < Fault.MALFORMED) & (ratings.faults != Fault.DUPLICATE)
        columns = (ratings.user_ids, ratings.movie_ids, ratings.timestamps_ms)
        found += [
            (t, record(u, m, 3.0, t)) for u, m, t in zip(*(column[fresh].tolist() for column in columns), strict=True)
        ]
    return found


def test_who_predicts_all_that_can_be_read_has_predicted_all() -> None:
    world = World(50.0, 6_000, users=300, movies=200, **SPOILT)
    every = readable(world)
    assert len(every) < 0.7 * sum(len(r) for r in world.ratings)
    found = score(world.board(), [value for _, value in every])
    assert (found["delivered"], found["coverage"]) == (len(every), 1.0)
    assert found["matched"] == found["delivered"]
    half = score(world.board(), [value for _, value in every[::2]])
    assert half["coverage"] == pytest.approx(0.5, abs=0.01)
    # who has begun later, is judged by what came later
    middle = int(np.median([time_ms for time_ms, _ in every]))
    later = score(world.board(), [value for time_ms, value in every if time_ms >= middle])
    assert later["delivered"] < 0.6 * len(every) and later["coverage"] == pytest.approx(1.0, abs=0.03)


def test_a_wrong_clock_is_known_to_be_wrong_when_delivered_ratings_are_counted() -> None:
    world = World(50.0, 6_000, users=300, movies=200, clock_skew="0:-20s,1:15s")
    every = readable(world)
    middle = int(np.median([time_ms for time_ms, _ in every]))
    later = [value for time_ms, value in every if time_ms >= middle]
    found = score(world.board(), later)
    assert found["delivered"] == len(later)


def test_fresh_records_are_counted_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validity, "_BLOCK", 1_000)
    world = World(50.0, 9_000, users=300, movies=200, **SPOILT)
    ratings, faults = world.ratings[0], world.models[0].faults
    assert faults is not None and ratings.faults is not None
    fresh = np.cumsum((ratings.faults < Fault.MALFORMED) & (ratings.faults != Fault.DUPLICATE))
    counted = validity.FreshRecords(faults)
    for index in (0, 1, 7, 2_000, 999, 1_000, len(fresh), 1_001):
        assert counted.before(index) == (fresh[index - 1] if index else 0)


def test_a_prediction_waits_until_its_rating_is_delivered_or_its_patience_ends(small: World) -> None:
    values = small.records(small.truth)
    board = Scoreboard(small.settings, small.models, small.shares, "run", "c")
    board.take(values, 0)
    board.settle(scoring.WAITING_MS - 1)
    assert board.scores()[0]["waiting"] == len(values) and board.scores()[0]["scored"] == 0
    for progress in small.progress:
        board.progress(progress)
    board.settle(1)
    assert board.scores()[0]["waiting"] == 0 and board.scores()[0]["matched"] > 0.99 * len(values)
    impatient = Scoreboard(small.settings, small.models, small.shares, "run", "c")
    impatient.take(values, 0)
    impatient.settle(scoring.WAITING_MS)
    assert impatient.scores()[0]["unmatched"] == len(values)


def test_only_so_many_wait(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "WAITING_MOST", 10)
    board = Scoreboard(small.settings, small.models, small.shares, "run", "c")
    board.take(small.records(small.truth), 0)
    board.settle(0)
    assert board.scores()[0]["waiting"] == 10


GOOD = {"userId": 1, "movieId": 2, "prediction": 3.5, "timestamp": START_MS}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "not JSON"),
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        ({**GOOD, "userId": 0}, "userId"),
        ({**GOOD, "userId": 1.5}, "userId"),
        ({**GOOD, "userId": True}, "userId"),
        ({**GOOD, "movieId": 2**31}, "movieId"),
        ({**GOOD, "timestamp": "now"}, "timestamp"),
        ({**GOOD, "timestamp": 2**63}, "timestamp"),
        ({**GOOD, "prediction": math.nan}, "prediction"),
        ({**GOOD, "prediction": -math.inf}, "prediction"),
        ({**GOOD, "prediction": 10**400}, "prediction"),
        ({**GOOD, "prediction": "3.5"}, "prediction"),
        ({**GOOD, "prediction": False}, "prediction"),
        ({**GOOD, "model": ""}, "model"),
        ({**GOOD, "model": None}, "model"),
        ({**GOOD, "model": "x" * 101}, "model"),
        ({**GOOD, "model": "two\nlines"}, "model"),
        ({name: GOOD[name] for name in ("userId", "movieId", "timestamp")}, "prediction"),
        ({**GOOD, "userId": 301}, "no such user"),
        ({**GOOD, "movieId": 201}, "no such movie"),
    ],
)
def test_malformed_records_are_counted_by_reason_and_stop_nothing(small: World, value: Any, reason: str) -> None:
    board = small.board()
    data = json.dumps(value).encode() if isinstance(value, dict) else value
    board.take([data, json.dumps({**GOOD, "prediction": 900, "more": 1}).encode()], 0)
    board.settle(None)
    (why,) = board.totals()["rejected"]
    assert reason in why and board.totals()["rejected"] == {why: 1} and board.totals()["records"] == 2
    assert [(s["model"], s["scored"]) for s in board.scores() if s["scored"]] == [("default", 1)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=60) | st.dictionaries(st.sampled_from(list(GOOD)), st.integers() | st.floats() | st.text()))
def test_whatever_comes_is_a_prediction_or_has_a_reason(value: Any) -> None:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    try:
        model, user, movie, stars, time_ms = parse_record(data)
    except InvalidPrediction as error:
        assert len(str(error)) < 80
    else:
        assert model and user > 0 and movie > 0 and math.isfinite(stars) and time_ms > 0


def test_models_are_bounded_and_further_ones_refused_with_a_count(small: World) -> None:
    board = small.board()
    board.take([json.dumps({**GOOD, "model": f"m{n}"}).encode() for n in range(scoring.MODELS_MOST + 7)], 0)
    board.settle(None)
    assert len(board.scores()) == scoring.MODELS_MOST
    assert board.totals()["rejected"] == {f"more than {scoring.MODELS_MOST} models": 7}
