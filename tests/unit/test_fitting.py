"""Fitting: from the ratings of a known world back to that world, and a stream from it; what is damaged is named."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.config import EVENT_FIELDS, Settings, load_settings
from ray_pipeline.conformance.evidence import Evidence
from ray_pipeline.conformance.judge import judge
from ray_pipeline.conformance.sample import regenerate
from ray_pipeline.conformance.world import START_MS, World
from ray_pipeline.errors import ConfigurationError, EnvironmentProblem, RatingsFileError, StateMismatchError
from ray_pipeline.fitted import REPLACED_FIELDS, FittedModel, FittedSide, load_fitted, write_fitted
from ray_pipeline.fitting.als import Residuals
from ray_pipeline.fitting.biases import fit_biases
from ray_pipeline.fitting.calibration import calibrate
from ray_pipeline.fitting.fit import fit
from ray_pipeline.fitting.habits import fit_whole_stars
from ray_pipeline.fitting.reading import ColumnNames, Ratings, read_ratings
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.partitioner import partition_of
from ray_pipeline.model.population import build_movies, build_user_map
from ray_pipeline.model.ratings import ShardModel, to_half_stars
from ray_pipeline.truth.law import RatingLaw, probabilities
from ray_pipeline.truth.replay import build_models, published_catalogue, published_settings

SMALL = {"users": 600, "movies": 200, "rank": 3, "activity_sigma": 0.6, "popularity_exponent": 0.6, "partitions": 2}
WORLD = load_settings(
    **SMALL, user_bias_share=0.2, movie_bias_share=0.25, factor_share=0.3, mean_rating=3.2, rating_sd=1.0
)
USER_IDS, MOVIE_IDS = 7 * np.arange(1, 601) + 1_000_000, 3 * np.arange(1, 201)
SILENT: Callable[[str], None] = lambda _line: None  # noqa: E731


def numpy_als(residuals: Residuals, rank: int, seed: int, tell: Callable[[str], None]) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regressions in turn: small enough to be seen to be right, and no Java."""
    users = np.zeros((residuals.users, rank))
    movies = np.random.default_rng(seed).normal(size=(residuals.movies, rank)) * 0.3
    sides = [(residuals.user, residuals.movie), (residuals.movie, residuals.user)]
    groups = [np.split(np.argsort(own, kind="stable"), np.cumsum(np.bincount(own, minlength=n))[:-1])
              for (own, _), n in zip(sides, (residuals.users, residuals.movies), strict=True)]  # fmt: skip
    for _ in range(8):
        for solved, known, (_, other), rows in zip((users, movies), (movies, users), sides, groups, strict=True):
            for i, mine in enumerate(rows):
                x = known[other[mine]]
                penalty = 0.05 * max(len(mine), 1) * np.eye(rank)
                solved[i] = np.linalg.solve(x.T @ x + penalty, x.T @ residuals.stars[mine])
    return users.astype(np.float32), movies.astype(np.float32)


def drawn(settings: Settings, count: int, first: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User ids, movie ids, half stars of a stream."""
    models = build_models(settings, load_catalogue(settings), range(settings.partitions))
    user_map = build_user_map(settings)
    parts = [m.draw(first, round(count * user_map.share(p))) for p, m in models.items()]
    return tuple(np.concatenate([getattr(d, n) for d in parts]) for n in ("user_ids", "movie_ids", "half_stars"))


@pytest.fixture(scope="module")
def data() -> Ratings:
    """Ratings of the known world, under ids of somebody else."""
    user_ids, movie_ids, half_stars = drawn(WORLD, 60_000)
    return Ratings(USER_IDS, MOVIE_IDS, (user_ids - 1).astype(np.int32), (movie_ids - 1).astype(np.int32), half_stars)


@pytest.fixture(scope="module")
def model(data: Ratings) -> FittedModel:
    return fit(data, None, 3, 1, 0.1, numpy_als, SILENT)


@pytest.fixture(scope="module")
def file(model: FittedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fitted") / "model.npz"
    write_fitted(path, model)
    return path


# -- the loop is closed: known world → ratings → fit → stream


def test_biases_and_popularity_are_those_of_the_world(model: FittedModel) -> None:
    models = build_models(WORLD, load_catalogue(WORLD), range(2))
    true_users = np.zeros(600)
    for m in models.values():
        true_users[m.users.user_ids - 1] = m.users.biases
    movies = build_movies(WORLD, load_catalogue(WORLD))
    assert np.corrcoef(model.users.biases, true_users)[0, 1] > 0.95
    assert np.corrcoef(model.movies.biases, movies.biases)[0, 1] > 0.95
    assert rank_correlation(model.movies.counts, probabilities(movies.popularity)) > 0.95


def test_the_held_out_error_is_near_the_floor_and_below_the_biases_alone(model: FittedModel, data: Ratings) -> None:
    rmse, floor = model.report["rmse"], true_floor(data)
    assert rmse["model"] < 0.93 * rmse["bias_only"] < 0.93 * rmse["global_mean"]
    assert floor < rmse["model"] < 1.1 * floor
    assert model.report["noise_sd"] == pytest.approx(1.0 * np.sqrt(0.25), rel=0.12)


def test_a_stream_from_the_model_is_like_the_data(model: FittedModel, data: Ratings, file: Path) -> None:
    settings = load_settings(model=file, partitions=2)
    user_ids, movie_ids, half_stars = drawn(settings, 200_000)
    assert half_stars.mean() == pytest.approx(data.half_stars.mean(), abs=0.06)
    assert half_stars.std() == pytest.approx(data.half_stars.std(), rel=0.04)
    assert set(np.unique(user_ids)) <= set(USER_IDS.tolist())
    assert set(np.unique(movie_ids)) <= set(MOVIE_IDS.tolist())
    for ids, known, position in ((user_ids, USER_IDS, data.user), (movie_ids, MOVIE_IDS, data.movie)):
        found = np.bincount(np.searchsorted(known, ids), minlength=len(known)) / len(ids)
        wanted = np.bincount(position, minlength=len(known)) / len(position)
        assert np.abs(found - wanted).sum() < 0.06


def test_shares_of_variance_are_what_the_stream_has(file: Path) -> None:
    settings = load_settings(model=file, partitions=2)
    models = build_models(settings, load_catalogue(settings), range(2))
    scores = np.concatenate([m.draw(0, 100_000).scores for m in models.values()])
    assert scores.mean() == pytest.approx(settings.mean_rating, abs=0.02)
    assert scores.std() == pytest.approx(settings.rating_sd, rel=0.02)
    assert models[0].noise_sd == pytest.approx(load_fitted(file).report["noise_sd"], rel=1e-4)


def test_the_stream_conforms_to_the_model(file: Path) -> None:
    world = World(load_settings(model=file, partitions=2, ratings=60_000, start_time_ms=START_MS))
    report = judge(Evidence(regenerate(world, None, 1_000_000), world), "made anew")
    assert report.verdict == "conforms", [row for row in report.checks if row.verdict == "deviates"]
    judged = {row.name for row in report.checks if row.verdict == "conforms"}
    assert {
        "user ids",
        "activity",
        "popularity",
        "mean",
        "spread",
        "user bias",
        "movie bias",
        "factors",
        "noise",
    } <= judged


def test_ratings_without_taste_get_no_factors(tmp_path: Path) -> None:
    world = load_settings(**{**SMALL, "factor_share": 0.0, "users": 300, "movies": 100})
    user_ids, movie_ids, half_stars = drawn(world, 4_000)
    data = Ratings(np.arange(1, 301), np.arange(1, 101), (user_ids - 1).astype(np.int32),
                   (movie_ids - 1).astype(np.int32), half_stars)  # fmt: skip
    fitted = fit(data, None, 3, 1, 0.2, numpy_als, SILENT)
    assert fitted.settings["factor_share"] < 0.03
    assert fitted.report["rmse"]["model"] < 1.02 * fitted.report["rmse"]["bias_only"]


def test_whole_stars_stay_whole_stars(tmp_path: Path) -> None:
    world = load_settings(**{**SMALL, "users": 300, "movies": 100}, whole_star_share=1.0)
    user_ids, movie_ids, half_stars = drawn(world, 10_000)
    data = Ratings(np.arange(1, 301), np.arange(1, 101), (user_ids - 1).astype(np.int32),
                   (movie_ids - 1).astype(np.int32), half_stars)  # fmt: skip
    write_fitted(tmp_path / "model.npz", fit(data, None, 3, 1, 0.1, numpy_als, SILENT))
    settings = load_settings(model=tmp_path / "model.npz", partitions=2)
    assert settings.whole_star_share == 1.0
    found = drawn(settings, 50_000)[2]
    assert set(np.unique(found)) == {2, 4, 6, 8, 10}
    assert found.mean() == pytest.approx(half_stars.mean(), abs=0.1)


def starred(shares: dict[float, float], count: int = 40_000) -> Ratings:
    """Ratings that say nothing of users and movies, with so large a share of each number of stars."""
    random = np.random.default_rng(1)
    user, movie = (random.integers(0, n, count).astype(np.int32) for n in (400, 100))
    half_stars = (2 * random.choice(list(shares), count, p=list(shares.values()))).astype(np.uint8)
    return Ratings(np.arange(1, 401), np.arange(1, 101), user, movie, half_stars)


def nothing(residuals: Residuals, rank: int, seed: int, tell: Callable[[str], None]) -> tuple[np.ndarray, np.ndarray]:
    """No taste."""
    return np.zeros((residuals.users, rank), np.float32), np.zeros((residuals.movies, rank), np.float32)


@pytest.mark.parametrize(
    ("shares", "raw"),
    [
        ({1: 0.06, 2: 0.02, 3: 0.02, 4: 0.05, 5: 0.85}, (6, 12)),
        ({1: 0.07, 2: 0.04, 3: 0.07, 4: 0.14, 5: 0.68}, (5.5, 6.5)),
        ({1: 0.97, 2: 0.01, 3: 0.005, 4: 0.005, 5: 0.01}, (-20, -4)),
        ({1: 0.0005, 4: 0.0005, 5: 0.999}, (5, 20)),
        ({5: 1.0}, (5, 5)),
        ({0.5: 0.7, 5: 0.3}, (-20, 2)),
        ({1: 0.1, 5: 0.9}, (5, 20)),
    ],
    ids=str,
)
def test_a_stream_has_the_datas_mean_however_much_of_it_is_cut_off(
    shares: dict[float, float], raw: tuple[float, float], tmp_path: Path
) -> None:
    data = starred(shares)
    write_fitted(tmp_path / "model.npz", fit(data, None, 2, 1, 0.1, nothing, SILENT))
    settings = load_settings(model=tmp_path / "model.npz", partitions=2, seed=7)
    assert raw[0] <= settings.mean_rating <= raw[1]
    found = drawn(settings, 100_000)[2] / 2
    assert found.mean() == pytest.approx(data.half_stars.mean() / 2, abs=0.05)
    assert (found == 5).mean() == pytest.approx(shares.get(5, 0), abs=0.07)


def test_tastes_are_found_where_most_ratings_are_the_highest(tmp_path: Path) -> None:
    world = load_settings(**SMALL, mean_rating=6.0, rating_sd=1.6, user_bias_share=0.3, movie_bias_share=0.2)
    user_ids, movie_ids, half_stars = drawn(world, 120_000)
    assert (half_stars == 10).mean() > 0.7
    positions = (user_ids - 1).astype(np.int32), (movie_ids - 1).astype(np.int32)
    data = Ratings(np.arange(1, 601), np.arange(1, 201), *positions, half_stars)
    write_fitted(tmp_path / "model.npz", fit(data, None, 3, 1, 0.1, numpy_als, SILENT))
    settings = load_settings(model=tmp_path / "model.npz", partitions=2)
    users, ours = np.zeros((2, 600)), drawn(settings, 120_000)
    assert ours[2].mean() == pytest.approx(half_stars.mean(), abs=0.1)
    for row, (who, stars) in enumerate(((user_ids, half_stars), (ours[0], ours[2]))):
        users[row] = np.bincount(who - 1, stars, 600) / np.maximum(np.bincount(who - 1, minlength=600), 1)
    often = np.bincount(user_ids - 1, minlength=600) > 100
    assert users[1, often].std() == pytest.approx(users[0, often].std(), rel=0.15)


def test_a_model_file_whose_settings_are_out_of_range_is_named(model: FittedModel, tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    write_fitted(path, replace(model, settings={**model.settings, "mean_rating": 99.0}))
    with pytest.raises(ConfigurationError, match=r"model\.npz: .*mean_rating.* 99\.0 .*Make the file again") as caught:
        load_settings(model=path)
    assert "--mean-rating" not in str(caught.value)


@pytest.fixture(scope="module")
def mixed() -> tuple[Ratings, np.ndarray]:
    """Ratings of a world in which two users of five give whole stars only, and who does."""
    world = load_settings(**SMALL, whole_star_share=0.4, factor_share=0.3)
    user_ids, movie_ids, half_stars = drawn(world, 60_000)
    whole = np.zeros(600, np.bool_)
    for m in build_models(world, load_catalogue(world), range(2)).values():
        assert m.users.habits.whole is not None
        whole[m.users.user_ids - 1] = m.users.habits.whole
    positions = (user_ids - 1).astype(np.int32), (movie_ids - 1).astype(np.int32)
    return Ratings(USER_IDS, MOVIE_IDS, *positions, half_stars), whole


def test_who_gives_whole_stars_only_does_so_in_the_stream(mixed: tuple[Ratings, np.ndarray], tmp_path: Path) -> None:
    data, whole = mixed
    model = fit(data, None, 3, 1, 0.1, numpy_als, SILENT)
    share, error = model.settings["whole_star_share"], model.report["whole_star_error"]
    assert error < 0.025 and share == pytest.approx(0.4, abs=3 * error)
    # a hundred ratings a user tell each one's habit
    assert np.array_equal(model.whole_stars > 0.5, whole)
    assert share == pytest.approx(whole.mean(), abs=0.01) == pytest.approx(model.whole_stars.mean(), abs=1e-4)
    write_fitted(tmp_path / "model.npz", model)
    settings = load_settings(model=tmp_path / "model.npz", partitions=2)
    user_ids, _, half_stars = drawn(settings, 200_000)
    found = np.bincount(np.searchsorted(USER_IDS, user_ids), half_stars % 2, 600)
    often = np.bincount(data.user, minlength=600) > 50
    assert np.array_equal((found == 0)[often], whole[often])
    assert (half_stars % 2 == 0).mean() == pytest.approx((data.half_stars % 2 == 0).mean(), abs=0.01)
    assert half_stars.std() == pytest.approx(data.half_stars.std(), rel=0.04)
    assert model.report["whole_ratings"] == (data.half_stars % 2 == 0).mean()
    world = World(load_settings(model=tmp_path / "model.npz", partitions=2, ratings=60_000, start_time_ms=START_MS))
    report = judge(Evidence(regenerate(world, None, 1_000_000), world), "made anew")
    assert report.verdict == "conforms", [row for row in report.checks if row.verdict == "deviates"]


def test_what_else_shapes_a_stream_shapes_a_fitted_one_too(file: Path) -> None:
    plain = drawn(load_settings(model=file, partitions=2), 20_000)
    for name, value in {
        "seed": 3,
        "taste_exposure": 0.8,
        "session_length": 5.0,
        "new_user_share": 0.4,
        "new_movie_share": 0.4,
        "drift": ("abrupt at=100 size=-1",),
        "attack": (f"review-bomb movie={MOVIE_IDS[3]} at=100 ratings=500",),
    }.items():
        changed = drawn(load_settings(model=file, partitions=2, **{name: value}), 20_000)
        assert not all(np.array_equal(a, b) for a, b in zip(plain, changed, strict=True)), name


def true_floor(data: Ratings) -> float:
    """RMSE of the world's own expectation on the ratings that the fit holds out, or any others."""
    total = count = 0.0
    for m in build_models(WORLD, load_catalogue(WORLD), range(2)).values():
        mine = np.isin(data.user + 1, m.users.user_ids)
        user = np.searchsorted(m.users.user_ids, data.user[mine] + 1)
        expected = RatingLaw(m.noise_sd).moments(m.score(user, data.movie[mine])).mean
        total += ((expected - data.half_stars[mine] / 2) ** 2).sum()
        count += mine.sum()
    return float(np.sqrt(total / count))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


# -- the parts


def test_biases_of_few_ratings_are_shrunk_and_missing_ones_are_0() -> None:
    half_stars = np.array([10] * 2 + [6] * 300 + [2] * 300, np.uint8)
    user = np.array([0] * 2 + [1, 2] * 300, np.int32)
    biases = fit_biases(Ratings(np.arange(1, 5), np.arange(1, 2), user, np.zeros(602, np.int32), half_stars))
    assert 0 < biases.users[0] < 3.0
    assert biases.users[3] == 0.0
    assert biases.mean == pytest.approx(half_stars.mean() / 2)


def halves(seed: int, users: int, share: float, spread: tuple[float, float], each: float = 4.0) -> Ratings:
    """A few ratings a user: some give no half star, the others each as often as a beta law has it."""
    random = np.random.default_rng(seed)
    given = 1 + random.poisson(each * random.lognormal(-0.3, 0.8, users))
    often = np.where(random.random(users) < share, 0.0, random.beta(*spread, users))
    user = np.repeat(np.arange(users, dtype=np.int32), given)
    half_stars = (8 - (random.random(len(user)) < often[user])).astype(np.uint8)
    return Ratings(np.arange(1, users + 1), np.arange(1, 2), user, np.zeros(len(user), np.int32), half_stars)


@pytest.mark.parametrize(
    ("share", "spread"), [(0.4, (50.0, 50.0)), (0.4, (2.0, 3.0)), (0.1, (5.0, 5.0)), (0.9, (3.0, 3.0))]
)
def test_the_share_of_whole_star_users_is_as_far_off_as_it_says(share: float, spread: tuple[float, float]) -> None:
    """Also where most users have so few ratings that they may be whole by chance."""
    found, by_chance = [], []
    for seed in range(30):
        data = halves(seed, 2_000, share, spread)
        habit = fit_whole_stars(data)
        assert habit.chance.mean() == pytest.approx(habit.share, abs=1e-3)
        assert (habit.chance[data.user[data.half_stars % 2 == 1]] == 0).all()
        found.append((habit.share - share) / habit.error)
        by_chance.append(len(habit.chance) - len(np.unique(data.user[data.half_stars % 2 == 1])))
    assert 0.6 < np.std(found) < 1.4 and abs(np.mean(found)) < 0.5
    assert np.mean(by_chance) / 2_000 > share + 0.01, "who counts users without a half star finds too many"


def test_the_habits_of_users_with_thousands_of_ratings_are_certain() -> None:
    data = halves(3, 200, 0.3, (2.0, 3.0), each=3_000.0)
    habit, gave = fit_whole_stars(data), np.unique(data.user[data.half_stars % 2 == 1])
    assert habit.share == pytest.approx(1 - len(gave) / 200, abs=1e-3) and 0.02 < habit.error < 0.04
    assert habit.chance.round(2).sum() == 200 - len(gave)


def test_a_habit_of_all_or_of_nobody_is_found_as_such() -> None:
    some = halves(1, 50, 0.0, (500.0, 5.0))
    nobody = some.where(np.isin(some.user, some.user[some.half_stars % 2 == 1]))
    for ratings, share in ((nobody, 0.0), (replace(some, half_stars=np.full(len(some), 6, np.uint8)), 1.0)):
        ids, user = np.unique(ratings.user, return_inverse=True)
        habit = fit_whole_stars(replace(ratings, user_ids=ids + 1, user=user.astype(np.int32)))
        assert (habit.share, habit.error, set(habit.chance.tolist())) == (share, 1 / len(ids), {share})


@pytest.mark.parametrize(
    ("mean", "noise_sd", "whole"), [(3.5, 0.8, 0.0), (4.4, 0.6, 0.0), (2.0, 1.2, 1.0), (3.8, 0.4, 0.5)]
)
def test_calibration_undoes_rounding_and_clipping(mean: float, noise_sd: float, whole: float) -> None:
    random = np.random.default_rng(5)
    part, other = random.normal(scale=0.6, size=40_000), random.normal(scale=0.3, size=40_000)
    noise = random.normal(scale=noise_sd, size=40_000)
    score = mean + part + other + noise
    stars = to_half_stars(score.astype(np.float32), random.random(40_000) < whole) / 2
    chance = np.full(40_000, whole, np.float32) if whole else None
    found = calibrate(stars, float(stars.mean()), [part / 2, other, random.normal(size=40_000)], chance)
    assert stars.mean() + found.shift == pytest.approx(mean, abs=0.03)
    assert found.stretch == pytest.approx((2.0, 1.0, 0.0), abs=0.06)
    assert found.noise_sd == pytest.approx(noise_sd, rel=0.03)
    assert found.rmse == pytest.approx((stars - np.clip(score - noise, 0.5 + whole / 2, 5)).std(), rel=0.03)


def test_the_same_ratings_and_seed_give_the_same_file(data: Ratings, model: FittedModel, tmp_path: Path) -> None:
    again = fit(data, None, 3, 1, 0.1, numpy_als, SILENT)
    other = fit(data, None, 3, 2, 0.1, numpy_als, SILENT)
    digests = [write_fitted(tmp_path / f"{n}.npz", m) for n, m in enumerate((model, again, other))]
    assert digests[0] == digests[1] != digests[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.npz", "1.npz", "2.npz"]


def test_too_few_ratings_are_refused() -> None:
    few = Ratings(np.arange(1, 3), np.arange(1, 3), *(np.zeros(60, np.int32),) * 2, np.full(60, 5, np.uint8))
    with pytest.raises(RatingsFileError, match="60 ratings are too few"):
        fit(few, None, 2, 1, 0.1, numpy_als, SILENT)


# -- the file


def table(rows: list[tuple[object, ...]]) -> str:
    return "userId,movieId,rating,timestamp\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)


GOOD = [(5, 7, 4.5, 1), (3, 7, 0.5, 2), (5, 2, "5", 3)]


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet"])
def test_ratings_are_read_from_csv_and_parquet(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"ratings.{suffix}"
    columns = pa.table({"title": ["a"] * 3, "who": [5, 3, 5], "what": [7, 7, 2], "stars": [4.5, 0.5, 5.0]})
    if suffix == "parquet":
        pyarrow.parquet.write_table(columns, path)
    else:
        with pa.output_stream(path) as out:
            pyarrow.csv.write_csv(columns, out)
    found = read_ratings(path, ColumnNames("who", "what", "stars"), SILENT)
    assert (found.user_ids.tolist(), found.movie_ids.tolist()) == ([3, 5], [2, 7])
    assert (found.user.tolist(), found.movie.tolist(), found.half_stars.tolist()) == ([1, 0, 1], [1, 1, 0], [9, 1, 10])


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("user,movieId,rating\n", 1, "column 'userId' is missing"),
        ("userId,userId,movieId,rating\n", 1, "column 'userId' stands twice"),
        (table([*GOOD, ("x", 1, 3, 1)]), 5, "userId 'x' is not a whole number"),
        (table([*GOOD, (0, 1, 3, 1)]), 5, "userId '0' is not"),
        (table([*GOOD, (1, 2**31, 3, 1)]), 5, "movieId '2147483648' is not"),
        (table([*GOOD, (1, "", 3, 1)]), 5, "movieId '' is not"),
        (table([*GOOD, (1, 1, 5.5, 1), ("y", 1, 1, 1)]), 5, "rating '5.5' is not one of"),
        (table([*GOOD, (1, 1, 4.25, 1)]), 5, "rating '4.25'"),
        (table([*GOOD, (1, 1, "nan", 1)]), 5, "rating 'nan'"),
        (table([*GOOD, (1, 1, "good", 1)]), 5, "rating 'good'"),
        (table([*GOOD, (1, 1, 4)]), 5, "3 columns instead of 4"),
        (table([*GOOD, ("\n1", 1, 9, 1)]), 6, "rating '9'"),
    ],
)
def test_a_damaged_line_is_named_with_the_reason(tmp_path: Path, text: str, line: int, reason: str) -> None:
    path = tmp_path / "ratings.csv"
    path.write_text(text)
    with pytest.raises(RatingsFileError) as caught:
        read_ratings(path, ColumnNames(), SILENT)
    assert f"line {line}: {reason}" in str(caught.value)


def test_damage_far_behind_the_first_block_is_named_too(tmp_path: Path) -> None:
    path = tmp_path / "ratings.csv"
    text = table([(1, 2, 3.5, 1_600_000_000_000_000 + i) for i in range(400_000)])
    path.write_text(text + "1,2,3,x\n1,2,seven,1\n")
    with pytest.raises(RatingsFileError, match="line 400003: rating 'seven'"):
        read_ratings(path, ColumnNames(), SILENT)


@pytest.mark.parametrize("suffix", ["gz", "bz2", "zst"])
def test_a_file_that_is_not_compressed_as_it_says_is_named(tmp_path: Path, suffix: str) -> None:
    whole, text = tmp_path / f"whole.csv.{suffix}", table([(1, 2, 3.5, i) for i in range(20_000)])
    with pa.output_stream(whole) as out:
        out.write(text.encode())
    assert len(read_ratings(whole, ColumnNames(), SILENT)) == 20_000
    for content in (whole.read_bytes()[:-200], text.encode(), whole.read_bytes()[:2000] + b"\0" * 5000):
        path = tmp_path / f"ratings.csv.{suffix}"
        path.write_bytes(content)
        with pytest.raises(
            RatingsFileError, match=r"ratings\.csv\.[a-z0-9]+ cannot be read: .*ends? in \.gz|line \d+: "
        ):
            read_ratings(path, ColumnNames(), SILENT)


def test_a_damaged_line_before_the_place_where_the_file_is_cut_off_is_named_or_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "ratings.csv.gz"
    path.write_bytes(
        gzip.compress(table([*GOOD, ("x", 1, 1, 1)] + [(1, 2, 3.5, i) for i in range(9000)]).encode())[:-20]
    )
    with pytest.raises(RatingsFileError, match=r"line 5: userId 'x'|cannot be read"):
        read_ratings(path, ColumnNames(), SILENT)


def test_a_column_that_is_named_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ratings.csv"
    path.write_text(table(GOOD))
    with pytest.raises(RatingsFileError, match=r"--user-column and --movie-column both name column 'userId'.*--movie-"):
        read_ratings(path, ColumnNames("userId", "userId"), SILENT)


def test_an_id_of_thousands_of_digits_is_named_in_short(tmp_path: Path) -> None:
    path = tmp_path / "ratings.csv"
    for number in ("9" * 5000, "0" * 5000):
        path.write_text(table([*GOOD, (number, 1, 3, 1)]))
        with pytest.raises(RatingsFileError, match=r"line 5: userId '.*' is not a whole number") as caught:
            read_ratings(path, ColumnNames(), SILENT)
        assert len(str(caught.value)) < 300
    path.write_text("x" * 200_000 + "\n")
    with pytest.raises(RatingsFileError, match="line 1: field larger than field limit"):
        read_ratings(path, ColumnNames(), SILENT)


def test_ratings_that_may_not_be_read_are_named_with_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "ratings.csv").touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RatingsFileError, match=r"ratings\.csv cannot be read .*denied.*another"):
        read_ratings(tmp_path / "ratings.csv", ColumnNames(), SILENT)


def test_what_is_no_file_of_ratings_is_said(tmp_path: Path) -> None:
    path = tmp_path / "ratings.parquet"
    with pytest.raises(RatingsFileError, match="does not exist"):
        read_ratings(path, ColumnNames(), SILENT)
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(RatingsFileError, match=r"Parquet|parquet"):
        read_ratings(path, ColumnNames(), SILENT)
    pyarrow.parquet.write_table(pa.table({"userId": [1, None], "movieId": [1, 1], "rating": [1.0, 2.0]}), path)
    with pytest.raises(RatingsFileError, match="row 2: userId ''"):
        read_ratings(path, ColumnNames(), SILENT)
    path.write_text(table([]))
    with pytest.raises(RatingsFileError, match="no rating"):
        read_ratings(path, ColumnNames(), SILENT)


# -- the stream


@given(st.integers(0, 2**40), st.integers(0, 300), st.integers(0, 300))
def test_a_rating_of_a_fitted_stream_does_not_depend_on_the_cut(file: Path, first: int, head: int, tail: int) -> None:
    one = fitted_shard(file)
    whole, parts = one.draw(first, head + tail), (one.draw(first, head), one.draw(first + head, tail))
    for name in ("user_ids", "movie_ids", "scores", "half_stars"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(p, name) for p in parts]))


def fitted_shard(file: Path, cache: dict[Path, ShardModel] = {}) -> ShardModel:  # noqa: B006
    if file not in cache:
        settings = load_settings(model=file, partitions=2)
        cache[file] = build_models(settings, load_catalogue(settings), [0])[0]
    return cache[file]


GOLDEN = "1715df22d96be3a215df36ed393790a9"


def test_the_first_ratings_of_a_fitted_stream_never_change(tmp_path: Path) -> None:
    """A model in whole numbers, so that no library's last bit has a say in what is compared."""
    base = load_settings(**SMALL)
    n, k = base.users, base.movies
    grid = (np.arange(n * 3) % 17 - 8).reshape(n, 3).astype(np.float32) / 32
    users = FittedSide(USER_IDS, grid, (grid[:, 0] / 2).astype(np.float32), np.arange(1, n + 1))
    movies = FittedSide(MOVIE_IDS, grid[:k, ::-1].copy(), grid[:k, 1].copy(), np.arange(k, 0, -1))
    settings = {name: getattr(base, name) for name in REPLACED_FIELDS}
    path = tmp_path / "model.npz"
    whole = np.zeros(n, np.float32)
    write_fitted(path, FittedModel(users, movies, whole, tuple(map(str, range(k))), ((),) * k, settings))
    digest = hashlib.sha256()
    for p in range(2):
        settings = load_settings(model=path, partitions=2)
        ratings = build_models(settings, load_catalogue(settings), [p])[p].draw(0, 20_000)
        assert np.all(partition_of(ratings.user_ids, 2) == p)
        for column, kind in ((ratings.user_ids, "<i8"), (ratings.movie_ids, "<i8"), (ratings.half_stars, "u1")):
            digest.update(column.astype(kind).tobytes())
    assert digest.hexdigest()[:32] == GOLDEN


def test_the_model_replaces_its_settings_and_refuses_them_beside_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(model=file, partitions=2)
    assert (settings.users, settings.movies, settings.rank) == (600, 200, 3)
    for name in REPLACED_FIELDS:
        assert name in EVENT_FIELDS
        with pytest.raises(ConfigurationError, match=f"{name} does not go with model="):
            load_settings(model=file, **{name: getattr(settings, name)})
    with pytest.raises(ConfigurationError, match="catalog does not go with model="):
        load_settings(model=file, catalog="movies.csv")
    monkeypatch.setenv("RAY_PIPELINE_PRESET", "movielens")
    with pytest.raises(ConfigurationError, match="does not go with model="):
        load_settings(model=file)


def test_a_missing_or_damaged_model_file_is_named(tmp_path: Path, file: Path, model: FittedModel) -> None:
    path = tmp_path / "model.npz"
    with pytest.raises(ConfigurationError, match=r"model\.npz cannot be read \(No such file"):
        load_settings(model=path)
    content = bytearray(file.read_bytes())
    path.write_bytes(content[:-500])
    with pytest.raises(ConfigurationError, match="is damaged or no model"):
        load_settings(model=path)
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="is damaged"):
        load_settings(model=path)
    write_fitted(path, replace(model, users=model.movies, movies=model.users))
    with pytest.raises(ConfigurationError, match="600"):
        load_settings(model=path)
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        write_fitted(tmp_path / "none" / "model.npz", model)


def test_the_identity_of_the_stream_changes_with_the_file(file: Path, model: FittedModel, tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    write_fitted(other, replace(model, titles=model.titles[::-1]))
    one, two = (load_settings(model=path, partitions=2) for path in (file, other))
    names = [s.digest(load_catalogue(s).digest) for s in (one, two)]
    assert names[0] != names[1]
    assert names[0] == (moved := load_settings(model=file, partitions=2)).digest(load_catalogue(moved).digest)
    run = {"run": "r", "config": names[0], "catalogue": load_catalogue(one).digest, "settings": one.event_settings()}
    ours = load_settings(partitions=2, model=file)
    assert published_settings(ours, run, published_catalogue(ours, run)).users == 600
    for settings, problem in (
        (load_settings(), "from a fitted model .*, and none is given.*--model"),
        (load_settings(model=other), "from another model file"),
    ):
        with pytest.raises(StateMismatchError, match=problem):
            published_settings(settings, run, published_catalogue(settings, run))
    drawn_run = {**run, "catalogue": "builtin-1-600", "config": one.digest("builtin-1-600")}
    with pytest.raises(StateMismatchError, match=r"not from a fitted model.*Leave --model out"):
        published_settings(ours, drawn_run, published_catalogue(ours, drawn_run))
