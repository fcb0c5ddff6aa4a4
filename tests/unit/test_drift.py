"""Drift and attacks: their texts, their effect, and the answer key."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from ray_pipeline.codec import encode_values
from ray_pipeline.config import load_settings
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.errors import ConfigurationError
from ray_pipeline.model.arrival import positions
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.drift import amplitude
from ray_pipeline.model.labels import attack_ratings, labels
from ray_pipeline.model.population import build_movies, build_user_map
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.scenario import parse_attack, parse_drift
from ray_pipeline.truth.answers import AnswerKey, answer_key
from ray_pipeline.truth.grade import grade_flagged
from ray_pipeline.truth.replay import ShardReplay, build_models

WORLD = {"users": 3_000, "movies": 500}
SHARES = [build_user_map(load_settings(**WORLD)).share(p) for p in range(4)]


def shard(partition: int = 0, **changes: Any) -> ShardModel:
    found = load_settings(**WORLD, **changes)
    movies = build_movies(found, load_catalogue(found))
    return ShardModel.of_shard(found, partition, build_user_map(found), movies)


# -- the texts


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "begins with ''"),
        ("sudden at=5 size=1", "begins with 'sudden'"),
        ("abrupt size=1", "at= is missing"),
        ("abrupt at=5", "size= is missing"),
        ("abrupt at=-5 size=1", "at=-5 is not a whole number"),
        ("abrupt at=5 size=9", "size=9 is not a number"),
        ("abrupt at=5 size=0", "shifts nothing"),
        ("abrupt at=5 size=nan", "size=nan is not a number"),
        ("abrupt at=5 at=6 size=1", "at is given twice"),
        ("abrupt at=5 size", "'size' is not name=value"),
        ("abrupt at=5 size=1 to=5", "not behind the beginning"),
        ("abrupt at=5 size=1 genre=Drama movie=3", "genre and movie exclude"),
        ("abrupt at=5 size=1 period=4", "period is unknown here"),
        ("gradual from=5 size=1", "to= is missing"),
        ("recurring period=1 size=1", "at least 2"),
        ("recurring period=10 on=1 size=1", "on must be"),
        ("abrupt at=5 size=1 cohort=0", "leaves nobody"),
        ("abrupt at=5 size=1 movie=x", "movie=x is not a whole number"),
        ("abrupt at=5 size=1 genre='Sci", "No closing quotation"),
        ("abrupt at=5 size=1 movie=501", "movie 501 is not in the catalogue"),
        ("abrupt at=5 size=1 genre=Horor", "has genre 'Horor'"),
    ],
)
def test_a_bad_drift_is_named_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason) as caught:
        load_catalogue(load_settings(**WORLD, drift=[text]))
    assert "drift" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("bomb movie=1", "begins with 'bomb'"),
        ("review-bomb at=5 ratings=5", "movie= is missing"),
        ("review-bomb movie=1 at=5 ratings=0", "at least 1"),
        ("review-bomb movie=1 at=5 ratings=5 rating=3.3", "no half star"),
        ("review-bomb movie=1 at=5 ratings=5 stealth=1", "leaves no attack"),
        ("review-bomb movie=1 at=5 ratings=5 intensity=0", "leaves nobody"),
        ("review-bomb movie=1 at=5 ratings=5 size=2", "size is unknown"),
        ("review-bomb movie=999 at=5 ratings=5", "movie 999 is not in the catalogue"),
    ],
)
def test_a_bad_attack_is_named_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason) as caught:
        load_catalogue(load_settings(**WORLD, attack=[text]))
    assert "attack" in str(caught.value) and "\n" not in str(caught.value)


def test_texts_may_stand_in_a_file_and_in_the_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('drift = ["abrupt at=5 size=1", "gradual from=1 to=9 size=-1 genre=Drama"]\n')
    assert len(load_settings(file).drift) == 2
    monkeypatch.setenv("RAY_PIPELINE_DRIFT", "abrupt at=5 size=1; abrupt at=6 size=1; abrupt at=7 size=1")
    assert [parse_drift(text).start for text in load_settings(file).drift] == [5, 6, 7]
    assert parse_drift('abrupt at=1_000 size=1 genre="Science Fiction"').scope.genre == "Science Fiction"


# -- drift


def test_the_course_of_each_kind_of_drift() -> None:
    at = np.array([0, 99, 100, 150, 199, 200, 300, 1e12])
    assert amplitude(parse_drift("abrupt at=100 size=1"), at).tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert amplitude(parse_drift("abrupt at=100 to=200 size=1"), at).tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    assert amplitude(parse_drift("gradual from=100 to=200 size=1"), at).tolist() == [0, 0, 0, 0.5, 0.99, 1, 1, 1]
    recurring = parse_drift("recurring from=100 period=100 on=0.4 size=1")
    assert amplitude(recurring, at).tolist() == [0, 0, 1, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("scope", ["", "genre=Drama", "movie=5", "cohort=0.3"])
def test_a_drift_shifts_the_scores_it_is_about_and_no_others(scope: str) -> None:
    drift = f"abrupt at=40000 size=-1.5 {scope}"
    plain, drifted = shard(1).draw(0, 20_000), shard(1, drift=[drift]).draw(0, 20_000)
    shift = drifted.scores.astype(float) - plain.scores
    late = positions(0, 20_000, SHARES[1]) >= 40_000
    catalogue = load_catalogue(load_settings(**WORLD))
    if scope.startswith("genre"):
        about = np.array(["Drama" in catalogue.genres[m - 1] for m in drifted.movie_ids])
    elif scope.startswith("movie"):
        about = drifted.movie_ids == 5
    elif scope.startswith("cohort"):
        members = np.unique(drifted.user_ids[shift < -1])
        assert len(members) == pytest.approx(0.3 * len(np.unique(drifted.user_ids)), rel=0.15)
        about = np.isin(drifted.user_ids, members)
    else:
        about = np.ones(20_000, bool)
    assert about.any() and shift[late & about] == pytest.approx(-1.5, abs=1e-5) and not shift[~(late & about)].any()
    assert np.array_equal(plain.user_ids, drifted.user_ids) and np.array_equal(plain.movie_ids, drifted.movie_ids)


def test_drifts_add_up() -> None:
    one, other = "abrupt at=0 size=1 genre=Drama", "abrupt at=0 size=0.5"
    both = shard(drift=[one, other]).draw(0, 2_000).scores - shard().draw(0, 2_000).scores
    assert set(np.round(both, 3).tolist()) == {0.5, 1.5}


# -- attacks


def struck(model: ShardModel, count: int) -> tuple[np.ndarray, np.ndarray]:
    strikes = model.attacks(0, count)
    assert strikes is not None
    return strikes.rows, strikes.hit


def test_an_attack_is_as_large_as_it_says_and_over_when_it_says() -> None:
    text = "review-bomb movie=318 at=30000 ratings=6000 cohort=0.05 stealth=0.25 intensity=0.2"
    assert parse_attack(text).end == 60_000
    hits = camouflage = 0
    members: set[int] = set()
    for p, share in enumerate(SHARES):
        model = shard(p, attack=[text])
        count = round(90_000 * share)
        rows, hit = struck(model, count)
        drawn, at = model.draw(0, count), positions(0, count, share)
        assert at[rows].min() >= 30_000 and at[rows].max() < 60_000
        assert (drawn.movie_ids[rows[hit]] == 318).all() and (drawn.half_stars[rows[hit]] == 1).all()
        members |= set(drawn.user_ids[rows].tolist())
        hits, camouflage = hits + int(hit.sum()), camouflage + int((~hit).sum())
        # all the others are as they would be without it
        others = np.setdiff1d(np.arange(count), rows)
        plain = shard(p).draw(0, count)
        assert np.array_equal(plain.scores[others], drawn.scores[others])
        assert np.array_equal(model.hits(np.arange(count)), np.isin(np.arange(count), rows[hit]))
    assert hits + camouflage == pytest.approx(6_000, rel=0.05)
    assert camouflage == pytest.approx(1_500, rel=0.1)
    assert len(members) == pytest.approx(0.05 * 3_000, rel=0.25)


def test_camouflage_is_an_honest_opinion() -> None:
    model = shard(attack=["review-bomb movie=318 at=0 ratings=20000 stealth=0.9 intensity=1 cohort=0.2"])
    rows, hit = struck(model, 4_000)
    drawn = model.draw(0, 4_000)
    honest = rows[~hit]
    user = np.searchsorted(model.users.user_ids, drawn.user_ids[honest])
    movie = np.searchsorted(model.movies.movie_ids, drawn.movie_ids[honest])
    noise = drawn.scores[honest] - model.score(user, movie)
    assert len(honest) > 3_000 and noise.std() == pytest.approx(float(model.noise_sd), rel=0.05)
    assert len(set(drawn.movie_ids[honest].tolist())) > 100


def test_an_attack_pushes_as_well() -> None:
    push = shard(attack=["review-bomb movie=318 at=0 ratings=1000 rating=5"])
    rows, hit = struck(push, 2_000)
    assert (push.draw(0, 2_000).half_stars[rows[hit]] == 10).all()


@pytest.mark.parametrize(
    ("rating", "half", "whole"), [("", 1, 2), ("rating=2.5", 5, 6), ("rating=4.5", 9, 10), ("rating=3", 6, 6)]
)
def test_who_gives_whole_stars_rounds_what_an_attack_gives(rating: str, half: int, whole: int) -> None:
    model = shard(attack=[f"review-bomb movie=318 at=0 ratings=1000 cohort=0.2 {rating}"], whole_star_share=0.5)
    rows, hit = struck(model, 2_000)
    drawn = model.draw(0, 2_000)
    user = np.searchsorted(model.users.user_ids, drawn.user_ids[rows[hit]])
    wholes = model.users.habits.whole[user]
    assert 0 < wholes.sum() < len(wholes)
    assert np.array_equal(drawn.half_stars[rows[hit]], np.where(wholes, whole, half))


def test_an_attack_needs_no_one_who_has_not_joined() -> None:
    text = "review-bomb movie=318 at=0 ratings=9000 intensity=1"
    model = shard(attack=[text], new_user_share=0.9, new_movie_share=0.9, arrival_ratings=10**6)
    drawn = model.draw(0, 2_000)
    assert model.users.arrivals and model.movies.arrivals and set(drawn.movie_ids.tolist()) == {318}
    user = np.searchsorted(model.users.user_ids, drawn.user_ids)
    assert (model.users.arrivals.joins[user] == 0).all() and model.movies.arrivals.joins[317] == 0


# -- the answer key


CHANGES: dict[str, Any] = {
    "drift": ["abrupt at=40000 size=-1.5 genre=Drama", "gradual from=0 to=100 size=1", "recurring period=50 size=1"],
    "attack": ["review-bomb movie=318 at=30000 ratings=6000 intensity=0.2"],
}


def test_the_key_says_where_each_change_begins_and_ends_in_every_partition() -> None:
    for p, share in enumerate(SHARES):
        key = labels(load_settings(**WORLD, **CHANGES), p, share)
        assert json.loads(json.dumps(key)) == key and {e["partition"] for e in key} == {p}
        assert [(e["kind"], e["number"]) for e in key] == [("drift", 0), ("drift", 1), ("drift", 2), ("attack", 0)]
        abrupt, gradual, recurring, attack = key
        assert abrupt["scope"] == {"of": "genre", "genre": "Drama"} and abrupt["end"] is None
        assert gradual["index"] == 0 < gradual["complete"] and gradual["scope"] == {"of": "all"}
        assert recurring["period"] == 50 and attack["movieId"] == 318 and attack["stars"] == 0.5
        count = round(90_000 * share)
        shift = shard(p, drift=CHANGES["drift"][:1]).draw(0, count).scores - shard(p).draw(0, count).scores
        assert not shift[: abrupt["index"]].any() and shift[abrupt["index"] :][:50].any()
        rows, _ = struck(shard(p, attack=CHANGES["attack"]), count)
        assert attack["index"] <= rows[0] < attack["index"] + 60 and attack["end"] - 60 < rows[-1] < attack["end"]
    assert labels(load_settings(), 0, 0.25) == []


def test_the_answer_key_names_changes_and_every_rating_of_an_attack_and_marks_a_detector_by_them() -> None:
    changes = {
        "drift": ["abrupt at=900 size=-1", "abrupt at=900 size=1 movie=3"],
        "attack": ["review-bomb movie=318 at=600 ratings=400 intensity=0.3 stealth=0.4"],
    }
    found = load_settings(**WORLD, **changes)
    progress = ShardProgress("r", "c", 1, 800, None, 0, (Epoch(1_700_000_000_000, 100.0),), SHARES[1], 0.5)
    replay = ShardReplay(build_models(found, load_catalogue(found), [1])[1], progress)
    values = encode_values(replay.events(0, 800))
    key = AnswerKey(replay, 0, labels(found, 1, SHARES[1]))
    cases = [*key.take(values[:300], range(300)), *key.take(values[300:], range(300, 800))]
    assert len({answer_key(case) for case in cases}) == len(cases) and all(c["offset"] == c["index"] for c in cases)
    assert sorted(c["kind"] for c in cases if c["kind"] != "attack_rating") == ["attack", "drift", "drift"]
    rows, hit = struck(replay.model, 800)
    singles = [c for c in cases if c["kind"] == "attack_rating"]
    assert [c["index"] for c in singles] == rows.tolist() and [not c["camouflage"] for c in singles] == hit.tolist()
    assert {c["rating"]["movieId"] for c in singles if not c["camouflage"]} == {318}
    by_movie = [value for value in values if value is not None and b'"movieId":318,' in value]
    marks = grade_flagged("attacked", cases, by_movie)
    assert marks.recall == 1.0 and marks.true_positives == hit.sum() and marks.precision > 0.9
    assert grade_flagged("attacked", cases, values).precision < 0.2


def test_each_rating_of_an_attack_can_be_listed() -> None:
    model = shard(2, attack=["review-bomb movie=318 at=0 ratings=1000 stealth=0.5"])
    listed = attack_ratings(model, 100, 500)
    rows, hit = struck(model, 600)
    assert [(e["index"], not e["camouflage"]) for e in listed] == [
        (int(r), bool(h)) for r, h in zip(rows, hit, strict=True) if r >= 100
    ]
    assert {(e["kind"], e["partition"], e["attack"]) for e in listed} == {("attack_rating", 2, 0)}
    assert attack_ratings(shard(2), 0, 500) == [] == attack_ratings(model, 10_000, 10)


def lost_by(count: int, first: int = 0, **changes: Any) -> tuple[ShardReplay, list[dict[str, Any]]]:
    """A shard, and the ratings that its answer key says were lost."""
    found = load_settings(**WORLD, drop_share=0.3, **changes)
    progress = ShardProgress("r", "c", 1, first + count, None, 0, (Epoch(1_700_000_000_000, 100.0),), SHARES[1], 0.5)
    replay = ShardReplay(build_models(found, load_catalogue(found), [1])[1], progress)
    cases = AnswerKey(replay, first).take(encode_values(replay.events(first, count)), range(count))
    return replay, [case for case in cases if case["kind"] == "dropped"]


@pytest.mark.parametrize("session_length", [1.0, 12.0])
def test_a_lost_rating_is_one_of_the_place_where_it_was_lost(session_length: float) -> None:
    changes = {
        "new_user_share": 0.8,
        "new_movie_share": 0.8,
        "arrival_ratings": 100_000,
        "session_length": session_length,
        "drift": ["abrupt at=50000 size=-3"],
    }
    replay, lost = lost_by(4_000, **changes)
    users, movies = replay.model.users, replay.model.movies
    assert len(lost) > 1_000 and users.arrivals and movies.arrivals
    at = np.array([case["index"] for case in lost]) / SHARES[1]
    for name, ids, joins in (
        ("userId", users.user_ids, users.arrivals.joins),
        ("movieId", movies.movie_ids, movies.arrivals.joins),
    ):
        of = joins[np.searchsorted(ids, [case["rating"][name] for case in lost])]
        assert (of <= at).all() and (of > 0).any(), name
    for first in (0, round(60_000 * SHARES[1])):  # before the drift, and after it
        replay, lost = lost_by(4_000, first, **changes)
        given = np.mean([case["rating"]["rating"] for case in lost])
        assert given == pytest.approx(replay.events(first, 4_000).half_stars.mean() / 2, abs=0.3)


def test_ratings_of_an_attack_are_lost_as_others_are() -> None:
    replay, lost = lost_by(4_000, attack=["review-bomb movie=318 at=4000 ratings=4000 intensity=0.5"])
    hits = replay.model.hits(np.arange(4_000)).mean()
    of_attack = [case for case in lost if case["rating"]["movieId"] == 318]
    assert hits > 0.2 and len(of_attack) / len(lost) == pytest.approx(hits, abs=0.05)
    assert len([case for case in of_attack if case["index"] < 4_000 * SHARES[1]]) < 20


@pytest.mark.parametrize("changes", [{}, {"session_length": 12.0, "taste_exposure": 0.7}])
def test_lost_ratings_are_those_that_they_always_were_where_nothing_is_scheduled(changes: dict[str, Any]) -> None:
    replay, lost = lost_by(200, **changes)
    for case in lost:
        drawn = replay.model.draw((1 << 40) + case["index"], 1)
        said = (case["rating"]["userId"], case["rating"]["movieId"], case["rating"]["rating"] * 2)
        assert said == (drawn.user_ids[0], drawn.movie_ids[0], drawn.half_stars[0])
