"""The model: purity, and that each knob has its effect."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.config import Settings, load_settings
from ray_pipeline.errors import CatalogueError
from ray_pipeline.model.alias import AliasTable
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.partitioner import partition_of
from ray_pipeline.model.population import build_movies, build_user_map, build_users
from ray_pipeline.model.ratings import ShardModel, to_half_stars
from ray_pipeline.model.streams import halfwords, lognormal_weights, normal_table, words
from ray_pipeline.truth.law import probabilities


def shard(partition: int = 0, **changes: object) -> tuple[Settings, ShardModel]:
    settings = load_settings(**changes)
    movies = build_movies(settings, load_catalogue(settings))
    users = build_users(settings, build_user_map(settings).users_of(partition))
    return settings, ShardModel(settings, partition, users, movies)


GOLDEN: dict[int, str] = {
    0: "c2096e55d89fc298905162928eea93ec",
    1: "ad65020faa942ca0adc96ba1c460c2de",
    2: "63224d4004f3aad330c35d4654ae5485",
    3: "b4abe34bc00e8b3bee0475a1d5e3d860",
}


@pytest.mark.parametrize("partition", range(4))
def test_the_first_100_000_ratings_of_each_partition_never_change(partition: int) -> None:
    _, model = shard(partition)
    drawn = model.draw(0, 100_000)
    digest = hashlib.sha256()
    for column, kind in ((drawn.user_ids, "<i8"), (drawn.movie_ids, "<i8"), (drawn.half_stars, "u1")):
        digest.update(column.astype(kind).tobytes())
    assert digest.hexdigest()[:32] == GOLDEN[partition]


@given(st.integers(0, 2**40), st.integers(0, 300), st.integers(0, 300))
def test_a_rating_does_not_depend_on_how_a_range_is_cut(first: int, head: int, tail: int) -> None:
    whole = MODEL.draw(first, head + tail)
    parts = MODEL.draw(first, head), MODEL.draw(first + head, tail)
    assert np.array_equal(whole.scores, np.concatenate([p.scores for p in parts]))
    assert np.array_equal(whole.user_ids, np.concatenate([p.user_ids for p in parts]))
    assert np.array_equal(whole.movie_ids, np.concatenate([p.movie_ids for p in parts]))


_, MODEL = shard(users=500, movies=200)


def test_ratings_are_half_stars_of_known_users_and_movies() -> None:
    settings, model = shard(partition=2)
    drawn = model.draw(0, 50_000)
    assert set(np.unique(drawn.half_stars)) == set(range(1, 11))
    assert np.all(partition_of(drawn.user_ids, settings.partitions) == 2)
    assert drawn.user_ids.min() >= 1
    assert drawn.user_ids.max() <= settings.users
    assert drawn.movie_ids.min() >= 1
    assert drawn.movie_ids.max() <= settings.movies


def test_every_user_belongs_to_one_partition_and_shares_add_up() -> None:
    settings = load_settings(users=10_007, partitions=7, actors=1)
    user_map = build_user_map(settings)
    owned = np.concatenate([user_map.users_of(p) for p in range(7)])
    assert np.array_equal(np.sort(owned), np.arange(1, 10_008))
    assert sum(user_map.share(p) for p in range(7)) == pytest.approx(1.0)


@pytest.mark.parametrize(("key", "hashed"), [(21, -973932308), (1, None), (12345, None)])
def test_murmur2_is_kafkas(key: int, hashed: int | None) -> None:
    expected = java_murmur2(str(key).encode())
    if key == 21:
        assert expected == hashed  # the value in Kafka's own UtilsTest
    for partitions in (1, 3, 4, 97):
        assert partition_of(np.array([key]), partitions)[0] == (expected & 0x7FFFFFFF) % partitions


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=50), st.integers(1, 1000))
def test_murmur2_of_any_ids(ids: list[int], partitions: int) -> None:
    expected = [(java_murmur2(str(i).encode()) & 0x7FFFFFFF) % partitions for i in ids]
    assert partition_of(np.array(ids), partitions).tolist() == expected


def java_murmur2(data: bytes) -> int:
    """A byte-by-byte transcription of the definition, for comparison."""
    mask = 0xFFFFFFFF
    h = 0x9747B28C ^ len(data)
    for i in range(0, len(data) - len(data) % 4, 4):
        k = int.from_bytes(data[i : i + 4], "little") * 0x5BD1E995 & mask
        k = (k ^ k >> 24) * 0x5BD1E995 & mask
        h = (h * 0x5BD1E995 & mask) ^ k
    rest = data[len(data) - len(data) % 4 :]
    if rest:
        h = (h ^ int.from_bytes(rest, "little")) * 0x5BD1E995 & mask
    h = (h ^ h >> 13) * 0x5BD1E995 & mask
    h ^= h >> 15
    return h - 2**32 if h >= 2**31 else h


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40).filter(any))
def test_an_alias_table_has_exactly_the_law_it_was_given(weights: list[int]) -> None:
    table = AliasTable.from_weights(np.array(weights, np.int64))
    mass = np.zeros(len(weights))
    own = np.where(table.alias == np.arange(len(weights)), 1.0, table.threshold / 2**32)
    np.add.at(mass, np.arange(len(weights)), own)
    np.add.at(mass, table.alias, 1.0 - own)
    assert mass / len(weights) == pytest.approx(np.array(weights) / sum(weights), abs=1e-8)


def test_an_alias_table_refuses_what_it_cannot_hold() -> None:
    for bad in ([], [0, 0], [-1, 2], [2**62, 2**62 - 1]):
        with pytest.raises(ValueError, match="weights"):
            AliasTable.from_weights(np.array(bad, np.int64))


@given(st.lists(st.integers(0, 2**55), min_size=1, max_size=60).filter(any))
def test_weights_that_overflow_a_table_are_halved_until_it_holds_them(weights: list[int]) -> None:
    given = np.array(weights, np.int64)
    held = AliasTable.scaled(given)
    if len(weights) * sum(weights) < 2**63:
        assert held is given
    assert np.array_equal(held > 0, given > 0)
    assert held / held.sum() == pytest.approx(given / given.sum(), abs=1e-12)
    assert len(AliasTable.from_weights(held)) == len(weights)


def test_millions_of_users_of_a_wide_law_fit_into_one_partition() -> None:
    count = 5_200_000
    settings = load_settings(users=count, activity_sigma=3, partitions=1, rank=1)
    ids = np.arange(1, count + 1)
    weights = lognormal_weights(3.0)[halfwords(settings.seed, "user/activity", 1, count)]
    assert count * int(weights.sum()) >= 2**63
    found = probabilities(build_users(settings, ids).activity)
    assert np.abs(found - weights / weights.sum()).sum() < 1e-4


def test_words_of_a_counter_can_be_made_alone() -> None:
    together = words(1, "x", 2, 10, 6)
    assert np.array_equal(together[3:4], words(1, "x", 2, 13, 1))
    assert not np.array_equal(words(1, "x", 2, 0, 4), words(1, "x", 3, 0, 4))
    assert not np.array_equal(words(1, "x", 2, 0, 4), words(2, "x", 2, 0, 4))
    assert np.array_equal(halfwords(1, "h", 5, 40), halfwords(1, "h", 0, 45)[5:])


def test_the_normal_table_is_standard_normal() -> None:
    table = normal_table().astype(np.float64)
    assert table.mean() == pytest.approx(0, abs=1e-6)
    assert table.var() == pytest.approx(1, abs=1e-3)
    assert (table**4).mean() == pytest.approx(3, abs=0.01)


def test_ties_between_half_stars_round_up_and_the_ends_clip() -> None:
    scores = np.array([-3, 0.74, 0.75, 1.0, 3.25, 3.2499, 4.75, 9.0], np.float32)
    assert to_half_stars(scores).tolist() == [1, 1, 2, 2, 7, 6, 10, 10]


@pytest.mark.parametrize("share", [0.0, 0.35, 0.7])
def test_factor_share_is_the_share_of_variance_the_factors_explain(share: float) -> None:
    """Two noiseless worlds, with and without factors: the difference is U·V."""
    base = {"user_bias_share": 0.1, "movie_bias_share": 0.1, "users": 20_000, "movies": 5_000}
    flat = {"popularity_exponent": 0.0, "activity_sigma": 0.0}
    _, model = shard(factor_share=share, **base, **flat)
    _, without = shard(factor_share=0.0, **base, **flat)
    n = 200_000
    noise_share = 1 - 0.2 - share
    score, plain = model.draw(0, n).scores.astype(float), without.draw(0, n).scores.astype(float)
    assert score.std() == pytest.approx(1.1, rel=0.02)
    # both worlds have the same noise draws, scaled by their own noise share
    factors = np.var(score - plain) - 1.21 * (np.sqrt(noise_share) - np.sqrt(0.8)) ** 2
    assert factors / 1.21 == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.1])
def test_popularity_exponent_is_the_slope_of_the_popularity(exponent: float) -> None:
    _, model = shard(popularity_exponent=exponent, users=2_000, movies=1_000)
    counts = np.sort(np.bincount(model.draw(0, 1_000_000).movie_ids, minlength=1001)[1:])[::-1]
    ranks = np.arange(1, 101)
    slope = -np.polyfit(np.log(ranks), np.log(counts[:100]), 1)[0]
    assert slope == pytest.approx(exponent, abs=0.05)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.2])
def test_activity_sigma_is_the_spread_of_the_users_activity(sigma: float) -> None:
    _, model = shard(activity_sigma=sigma, users=2_000, movies=50)
    counts = np.bincount(model.draw(0, 2_000_000).user_ids)
    spread = np.std(np.log(counts[counts > 0]))
    assert spread == pytest.approx(sigma, abs=0.06)


@pytest.mark.parametrize(
    ("changes", "same"),
    [({"seed": 43}, False), ({"rank": 10}, False), ({"rate": 5.0}, True), ({"actors": 1}, True)],
)
def test_only_event_settings_change_the_events(changes: dict[str, object], same: bool) -> None:
    size = {"users": 1_000, "movies": 300}
    _, one = shard(**size)
    _, other = shard(**size, **changes)
    assert np.array_equal(one.draw(0, 1000).scores, other.draw(0, 1000).scores) is same


def test_the_built_in_catalogue() -> None:
    catalogue = load_catalogue(load_settings())
    assert len(catalogue) == 27_278
    assert len(set(catalogue.titles)) == 27_278
    assert len(catalogue.genre_names) == 19
    assert catalogue.genre_matrix.any(axis=1).all()
    assert catalogue.index_of(np.array([1, 27_278, 27_279, 0])).tolist() == [0, 27_277, -1, -1]


HEADER = "movieId,title,genres\n"


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("id,title\n", 1, "header"),
        (HEADER, 2, "no movie"),
        (HEADER + "1,A\n", 2, "2 columns"),
        (HEADER + "1,A,Drama\nx,B,Drama\n", 3, "movieId 'x'"),
        (HEADER + "1,A,Drama\n1,B,Drama\n", 3, "twice"),
        (HEADER + "1,,Drama\n", 2, "title is empty"),
        (HEADER + "1,A,Drama||War\n", 2, "empty name"),
        (HEADER + '1,"A" b,Drama\n', 2, "expected after"),
        (HEADER + "9" * 5000 + ",A,Drama\n", 2, "movieId '9.*' is not a whole number"),
        (HEADER + '1,"A\nB\n\nC",Drama\n2,B,\n2,C,\n', 7, "twice"),
        (HEADER + "1,A\u2028B\x0c,Drama\n2,\x85 \x0b,Drama\n", 3, "title is empty"),
        (HEADER + '1,"A' + "\x1cB\u2029" + '\nC",Drama\nx,B,Drama\n', 4, "movieId 'x'"),
    ],
)
def test_a_malformed_catalogue_row_is_named_by_its_line(tmp_path, text: str, line: int, reason: str) -> None:
    path = tmp_path / "movies.csv"
    path.write_text(text)
    with pytest.raises(CatalogueError, match=reason) as caught:
        load_catalogue(load_settings(catalog=path))
    assert f"line {line}:" in str(caught.value)


def test_a_catalogue_that_may_not_be_read_is_named_with_a_fix(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "movies.csv"
    path.write_text(HEADER + "1,A,Drama\n")
    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(CatalogueError, match=r"movies\.csv cannot be read .*denied.*--catalog"):
        load_catalogue(load_settings(catalog=path))
    with pytest.raises(CatalogueError, match="does not exist"):
        load_catalogue(load_settings(catalog=tmp_path))


@pytest.mark.parametrize("rare", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"], ids=ascii)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=repr)
def test_a_title_may_hold_what_ends_lines_elsewhere(tmp_path, rare: str, end: str) -> None:
    path = tmp_path / "movies.csv"
    rows = ["movieId,title,genres", f"1,A{rare}B (1999),Drama", f'2,"C{rare}{end}D, ""E""",Comedy', "3,F,War"]
    path.write_text(end.join(rows), encoding="utf-8", newline="")
    catalogue = load_catalogue(load_settings(catalog=path))
    assert catalogue.titles == (f"A{rare}B (1999)", f'C{rare}{end}D, "E"', "F")
    assert catalogue.genres == (("Drama",), ("Comedy",), ("War",))


def test_a_catalogue_of_ones_own(tmp_path) -> None:
    path = tmp_path / "movies.csv"
    path.write_text(HEADER + '7,"Heat, The (1995)",Crime|Drama\n3,Plain (2000),(no genres listed)\n')
    settings = load_settings(catalog=path, users=100)
    catalogue = load_catalogue(settings)
    assert catalogue.titles == ("Plain (2000)", "Heat, The (1995)")
    assert catalogue.genres == ((), ("Crime", "Drama"))
    assert catalogue.title_of(7) == "Heat, The (1995)"
    assert catalogue.title_of(8) is None
    movies = build_movies(settings, catalogue)
    users = build_users(settings, build_user_map(settings).users_of(0))
    assert set(ShardModel(settings, 0, users, movies).draw(0, 100).movie_ids.tolist()) == {3, 7}
