"""People and movies: each knob moves what it is about, by as much as it says, and any rating can still be made alone."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.config import Settings, load_settings
from ray_pipeline.errors import ConfigurationError
from ray_pipeline.model.arrival import first_at, positions
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.exposure import LOOKS
from ray_pipeline.model.genres import with_genres
from ray_pipeline.model.population import build_movies, build_user_map
from ray_pipeline.model.ratings import Drawn, ShardModel, to_half_stars
from ray_pipeline.model.sessions import LANES
from ray_pipeline.model.streams import halfwords, halfwords_of

SMALL = {"users": 2_000, "movies": 600}
FLAT = {"popularity_exponent": 0.0, "activity_sigma": 0.0}
EVERYTHING = {
    "genre_share": 0.4,
    "user_scale_sigma": 0.3,
    "whole_star_share": 0.5,
    "taste_exposure": 0.8,
    "session_length": 6.5,
    "new_user_share": 0.4,
    "new_movie_share": 0.4,
    "arrival_ratings": 60_000,
    "drift": [
        "abrupt at=20_000 genre=Horror size=-1",
        "gradual from=10000 to=50000 cohort=0.3 size=0.7",
        "recurring period=9000 on=0.3 movie=5 size=2",
    ],
    "attack": [
        "review-bomb movie=318 at=15000 ratings=4000 stealth=0.3",
        "review-bomb movie=7 at=16000 ratings=800 rating=5 cohort=0.1",
    ],
}


def shard(partition: int = 0, **changes: Any) -> ShardModel:
    found = load_settings(**changes)
    movies = build_movies(found, load_catalogue(found))
    return ShardModel.of_shard(found, partition, build_user_map(found), movies)


def places(model: ShardModel, drawn: Drawn) -> tuple[np.ndarray, np.ndarray]:
    users, movies = model.users.user_ids, model.movies.movie_ids
    return np.searchsorted(users, drawn.user_ids), np.searchsorted(movies, drawn.movie_ids)


def same(one: Drawn, *parts: Drawn) -> bool:
    return all(
        np.array_equal(getattr(one, name), np.concatenate([getattr(p, name) for p in parts]))
        for name in ("user_ids", "movie_ids", "scores", "half_stars")
    )


FULL = shard(partition=1, **SMALL, **EVERYTHING)


@given(st.integers(0, 40_000) | st.integers(0, 2**40), st.integers(0, 300), st.integers(0, 300))
@settings(deadline=None)
def test_with_every_knob_on_a_rating_does_not_depend_on_how_a_range_is_cut(first: int, head: int, tail: int) -> None:
    whole = FULL.draw(first, head + tail)
    assert same(whole, FULL.draw(first, head), FULL.draw(first + head, tail))


@pytest.mark.parametrize("name", [name for name in EVERYTHING if name != "arrival_ratings"])
def test_each_knob_alone_is_cut_anywhere_and_changes_the_ratings(name: str) -> None:
    changes = {name: EVERYTHING[name], "arrival_ratings": 60_000}
    model, default = shard(**SMALL, **changes), shard(**SMALL)
    whole = model.draw(0, 30_000)
    cuts = [0, 1, 8, 4_095, 4_097, 11_111, 30_000]
    assert same(whole, *(model.draw(lo, hi - lo) for lo, hi in itertools.pairwise(cuts)))
    assert not same(whole, default.draw(0, 30_000))


def test_every_rating_stays_within_the_contract() -> None:
    drawn = FULL.draw(0, 60_000)
    whole = FULL.users.habits.whole[places(FULL, drawn)[0]]
    assert set(np.unique(drawn.half_stars[whole])) == {2, 4, 6, 8, 10}
    assert set(np.unique(drawn.half_stars[~whole])) == set(range(1, 11))
    assert np.isin(drawn.user_ids, FULL.users.user_ids).all() and np.isin(drawn.movie_ids, FULL.movies.movie_ids).all()


def test_parts_add_up_to_what_is_drawn() -> None:
    first = 8_000
    drawn = FULL.draw(first, 200)
    struck = hits = drifted = whole = 0
    for n in range(200):
        parts = FULL.parts(first + n)
        total = FULL_MEAN + parts.user_bias + parts.movie_bias + parts.dot_product + parts.drift + parts.noise
        assert parts.score == drawn.scores[n] and total == pytest.approx(parts.score, abs=1e-4)
        struck, hits, drifted = struck + (parts.attack is not None), hits + parts.hit, drifted + (parts.drift != 0)
        if not parts.hit:
            assert float(np.clip(parts.nearest_step, parts.step, 5)) == drawn.half_stars[n] / 2
        whole = whole + (parts.step == 1)
    assert 0 < whole < 200 and struck > hits > 0 and drifted > 20


FULL_MEAN = load_settings().mean_rating


# -- signal


@pytest.mark.parametrize("changes", [{}, {"genre_share": 0.6}, {"user_scale_sigma": 0.4}, {"genre_share": 1.0}])
def test_measured_shares_of_variance_are_the_declared_ones(changes: dict[str, Any]) -> None:
    found = load_settings(user_bias_share=0.15, movie_bias_share=0.2, factor_share=0.35)
    model = shard(users=40_000, movies=20_000, partitions=1, actors=1, **FLAT, **changes)
    drawn = model.draw(0, 200_000)
    user, movie = places(model, drawn)
    scale = np.ones(len(user)) if model.users.habits.scales is None else model.users.habits.scales[user].astype(float)
    dot = np.einsum("ij,ij->i", model.users.factors[user].astype(float), model.movies.factors[movie].astype(float))
    parts = {
        "user_bias_share": model.users.biases[user].astype(float),
        "movie_bias_share": scale * model.movies.biases[movie],
        "factor_share": dot,
    }
    total = found.rating_sd**2
    shares = {name: part.var() / total for name, part in parts.items()}
    for name, share in shares.items():
        assert share == pytest.approx(getattr(found, name), abs=0.012), name
    noise = drawn.scores - model.score(user, movie)
    assert noise.var() / total == pytest.approx(0.3, abs=0.012)
    assert drawn.scores.var() == pytest.approx(total, rel=0.03)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_genre_share_is_how_near_movies_of_the_same_genres_lie(share: float) -> None:
    model = shard(users=10, movies=20_000, genre_share=share, partitions=1, actors=1)
    catalogue = load_catalogue(load_settings(movies=20_000))
    kinds = {names: n for n, names in enumerate(sorted(set(catalogue.genres)))}
    kind = np.array([kinds[names] for names in catalogue.genres])
    factors = model.movies.factors.astype(float)
    assert (factors**2).mean() == pytest.approx(1.0, abs=0.02) and np.abs(factors.mean(axis=0)).max() < 0.03
    count = np.bincount(kind)
    means = np.stack([np.bincount(kind, column) / count for column in factors.T])
    often = count >= 50
    # variance between the kinds, less what chance makes of the means of few movies
    between = (count * (means**2).mean(axis=0))[often].sum() / count[often].sum()
    chance = (1 - share) * often.sum() / count[often].sum()
    assert between - chance == pytest.approx(share, abs=0.04)


def test_a_movie_without_genres_keeps_its_own_factors(tmp_path: Any) -> None:
    path = tmp_path / "movies.csv"
    path.write_text("movieId,title,genres\n1,A,Drama\n2,B,Drama|War\n3,C,(no genres listed)\n")
    catalogue = load_catalogue(load_settings(catalog=path))
    factors = np.ones((3, 4), np.float32)
    mixed = with_genres(factors, catalogue, 1, 0.5)
    assert (mixed[2] == 1).all() and (mixed[:2] != 1).all()


@pytest.mark.parametrize("sigma", [0.0, 0.25, 0.5])
def test_user_scale_sigma_is_the_spread_of_the_users_scales(sigma: float) -> None:
    model = shard(users=3_000, movies=400, partitions=1, actors=1, user_scale_sigma=sigma, **FLAT)
    drawn = model.draw(0, 600_000)
    user = drawn.user_ids - 1
    count = np.bincount(user)
    mean = np.bincount(user, drawn.scores) / count
    spread = np.sqrt(np.bincount(user, (drawn.scores - mean[user]) ** 2) / (count - 1))
    # about 200 ratings each: chance alone makes a spread of 0.05, and tastes differ in strength
    alike = shard(users=3_000, movies=400, partitions=1, actors=1, **FLAT).draw(0, 600_000)
    base = np.bincount(user, (alike.scores - (np.bincount(user, alike.scores) / count)[user]) ** 2) / (count - 1)
    measured = np.sqrt(max(0.0, np.log(spread).var() - np.log(np.sqrt(base)).var()))
    assert measured == pytest.approx(sigma, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_whole_stars_are_the_scores_of_those_users_rounded_to_whole_stars(share: float) -> None:
    plain, model = shard(**SMALL), shard(**SMALL, whole_star_share=share)
    half, drawn = plain.draw(0, 20_000), model.draw(0, 20_000)
    assert all(np.array_equal(getattr(half, n), getattr(drawn, n)) for n in ("user_ids", "movie_ids", "scores"))
    whole = model.users.habits.of(places(model, drawn)[0]).whole
    whole = np.zeros(20_000, np.bool_) if whole is None else whole
    rounded = np.clip(np.floor(drawn.scores + np.float32(0.5)), 1, 5)
    assert np.array_equal(drawn.half_stars / 2, np.where(whole, rounded, half.half_stars / 2))
    assert share * 20_000 == pytest.approx(whole.sum(), rel=0.2)


def test_scores_of_whole_stars_and_half_ones_round_beside_each_other() -> None:
    scores = np.array([-3, 1.49, 1.5, 2.5, 4.4999, 9, 2.74], np.float32)
    whole = np.array([True] * 6 + [False])
    assert to_half_stars(scores, whole).tolist() == [2, 2, 4, 6, 8, 10, 5]


def test_who_gives_whole_stars_depends_on_seed_and_user_alone() -> None:
    changes = {"users": 20_000, "movies": 50, "whole_star_share": 0.4}
    whole = np.zeros(20_001, np.bool_)
    for partition in range(4):
        users = shard(partition, **changes).users
        whole[users.user_ids] = users.habits.whole
    assert whole.sum() == pytest.approx(8_000, rel=0.03)
    alone = shard(0, **changes, partitions=1, actors=1, activity_sigma=0.3, user_scale_sigma=0.2).users
    assert np.array_equal(alone.habits.whole, whole[1:])
    more = shard(0, **{**changes, "whole_star_share": 0.6}, partitions=1, actors=1).users.habits.whole
    assert (more >= alone.habits.whole).all() and more.sum() == pytest.approx(12_000, rel=0.03)
    other = shard(0, **changes, partitions=1, actors=1, seed=7).users.habits.whole
    assert (other & alone.habits.whole).sum() == pytest.approx(0.16 * 20_000, rel=0.06)


# -- exposure


def test_taste_exposure_is_how_far_taste_decides_what_is_watched() -> None:
    lifts, worst = [], []
    for degree in (0.0, 0.5, 1.0):
        model = shard(users=2_000, movies=4_000, taste_exposure=degree, **FLAT)
        user, movie = places(model, model.draw(0, 60_000))
        taste = (model.score(user, movie) - model.users.biases[user]) / (1.1 * np.sqrt(0.55))
        lifts.append(taste.mean())
        worst.append((taste < -1).mean())
    assert lifts[0] == pytest.approx(0.0, abs=0.05)
    # E[t | taken] for looks with acceptance 1 - degree · Φ(-2t), the last look taken in any case, t standard normal
    assert lifts[1] - lifts[0] == pytest.approx(expected_lift(0.5), abs=0.03)
    assert lifts[2] - lifts[0] == pytest.approx(expected_lift(1.0), abs=0.03)
    assert worst[0] > 2 * worst[1] * 0.7 > 4 * worst[2] * 0.7


def expected_lift(degree: float) -> float:
    t = np.linspace(-6, 6, 6_001)
    law = np.exp(-(t**2) / 2)
    law /= law.sum()
    below = np.cumsum(law)
    passed = degree * np.interp(-2 * t, t, below)
    lift, reach = 0.0, 1.0
    for look in range(LOOKS):
        taken = law if look == LOOKS - 1 else law * (1 - passed)
        lift += reach * float(taken @ t)
        reach *= float(law @ passed)
    return lift


def test_popularity_still_counts_under_taste() -> None:
    popular = np.bincount(shard(**SMALL).draw(0, 100_000).movie_ids, minlength=601)
    tasted = np.bincount(shard(**SMALL, taste_exposure=1.0).draw(0, 100_000).movie_ids, minlength=601)
    assert np.corrcoef(np.log(popular[1:] + 1), np.log(tasted[1:] + 1))[0, 1] > 0.7


# -- sessions


@pytest.mark.parametrize("length", [1.0, 1.5, 4.0, 33.0])
def test_session_length_is_the_mean_number_of_ratings_in_a_row(length: float) -> None:
    model = shard(users=20_000, movies=50, session_length=length, activity_sigma=0.0)
    users = model.draw(0, LANES * 50_000).user_ids.reshape(-1, LANES)
    changes = (users[1:] != users[:-1]).mean()
    assert 1 / changes == pytest.approx(length, rel=0.04)


def test_sessions_of_several_users_interleave_and_leave_the_activity_as_it_was() -> None:
    changes = {"users": 2_000, "movies": 50}
    drawn = shard(**changes, session_length=10.0).draw(0, 800_000).user_ids
    assert np.mean([len(set(drawn[n : n + LANES].tolist())) for n in range(0, 80_000, 997)]) > 6
    alone = np.bincount(shard(**changes).draw(0, 800_000).user_ids, minlength=2_001)
    often = alone > 400
    ratio = np.bincount(drawn, minlength=2_001)[often] / alone[often]
    assert ratio.mean() == pytest.approx(1.0, abs=0.02) and ratio.std() < 0.25


# -- arrivals


@pytest.mark.parametrize("partition", [0, 3])
def test_nobody_occurs_before_joining(partition: int) -> None:
    model = shard(
        partition, **SMALL, new_user_share=0.5, new_movie_share=0.5, arrival_ratings=40_000, session_length=5.0
    )
    assert model.users.arrivals and model.movies.arrivals
    share = build_user_map(load_settings(**SMALL)).share(partition)
    drawn = model.draw(0, 20_000)
    at = positions(0, 20_000, share)
    user, movie = places(model, drawn)
    assert (model.users.arrivals.joins[user] <= at).all() and (model.movies.arrivals.joins[movie] <= at).all()
    late = np.flatnonzero(model.movies.arrivals.joins > 20_000)
    before, after = at < 20_000, at > 40_000
    law = np.bincount(movie[before], minlength=600), np.bincount(movie[after], minlength=600)
    assert law[0][late].sum() == 0 < law[1][late].sum()


def test_so_many_join_and_a_movie_joins_every_shard_at_the_same_position() -> None:
    changes = {
        "users": 20_000,
        "movies": 5_000,
        "new_user_share": 0.3,
        "new_movie_share": 0.6,
        "arrival_ratings": 10**9,
    }
    one, other = shard(0, **changes), shard(2, **changes)
    assert one.users.arrivals and one.movies.arrivals and other.movies.arrivals
    assert (one.users.arrivals.joins > 0).mean() == pytest.approx(0.3, abs=0.03)
    joins = one.movies.arrivals.joins
    assert (joins > 0).mean() == pytest.approx(0.6, abs=0.03) and np.array_equal(joins, other.movies.arrivals.joins)
    assert joins.max() <= 10**9 and np.median(joins[joins > 0]) == pytest.approx(5e8, rel=0.06)


def test_when_all_have_joined_the_stream_is_as_if_they_always_had_been_there() -> None:
    changes = {"new_user_share": 0.5, "new_movie_share": 0.5, "arrival_ratings": 10_000}
    assert same(shard(**SMALL, **changes).draw(50_000, 5_000), shard(**SMALL).draw(50_000, 5_000))


def test_the_smallest_world_has_a_founder() -> None:
    tiny = {"users": 8, "movies": 1, "new_user_share": 0.95, "new_movie_share": 0.95, "arrival_ratings": 10**12}
    assert len(shard(**tiny).draw(0, 10).user_ids) == 10


@given(st.integers(0, 10**12), st.floats(1e-4, 1.0))
def test_a_position_has_one_first_index(position: int, share: float) -> None:
    index = first_at(position, share)
    assert index / share >= position and (index == 0 or (index - 1) / share < position)


def test_what_belongs_to_an_id_does_not_depend_on_who_else_is_asked_for() -> None:
    ids = np.array([3, 4, 7, 131_071, 131_072, 5_000_000, 2_000_000_001], np.int64)
    together = halfwords_of(1, "x", ids, 3)
    assert all(np.array_equal(halfwords_of(1, "x", ids[n : n + 1], 3)[0], together[n]) for n in range(len(ids)))
    assert np.array_equal(halfwords(1, "x", 3 * 3, 6).reshape(2, 3), together[:2])
    assert halfwords_of(1, "x", ids[:0], 3).shape == (0, 3)


# -- settings


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"whole_star_share": "1.25"}, "whole_star_share"),
        ({"session_length": "0.5"}, "session_length"),
        ({"new_user_share": "1"}, "new_user_share"),
        ({"taste_exposure": "0.5", "factor_share": "0", "movie_bias_share": "0"}, "taste_exposure needs tastes"),
        ({"genre_share": "0.5", "factor_share": "0"}, "genre_share is a share"),
    ],
)
def test_a_knob_that_could_have_no_effect_or_is_out_of_range_is_refused(flags: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        load_settings(**flags)


def test_a_stream_keeps_its_name_while_no_new_knob_is_turned() -> None:
    assert load_settings().digest("x") == "80a87b9b452ad442"
    names = {load_settings(**{name: value}).digest("catalogue") for name, value in EVERYTHING.items()}
    assert len(names | {load_settings().digest("catalogue")}) == len(EVERYTHING) + 1


def test_settings_that_a_run_published_come_back_as_they_were() -> None:
    found = load_settings(**EVERYTHING)
    published = json.loads(json.dumps(found.event_settings()))
    again = load_settings(rate=7.0).with_events(published)
    assert again.event_settings() == found.event_settings() and again.rate == 7.0
    older = {name: value for name, value in published.items() if name not in EVERYTHING}
    assert load_settings().with_events(older) == load_settings() == Settings()
