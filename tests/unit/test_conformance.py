"""Conformance: a stream that is as declared passes, one that is not fails, and no setting is left out."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ray_pipeline.__main__ import app
from ray_pipeline.config import EVENT_FIELDS, Settings, load_settings
from ray_pipeline.conformance.evidence import Evidence
from ray_pipeline.conformance.judge import ConformanceReport, holm, judge
from ray_pipeline.conformance.measure import Estimate, quadratic
from ray_pipeline.conformance.page import render_page
from ray_pipeline.conformance.registry import CHECKS, NOT_OF_THE_DATA, checks_of
from ray_pipeline.conformance.sample import Sample, regenerate
from ray_pipeline.conformance.world import START_MS, World
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.errors import ConfigurationError, UncheckedError
from ray_pipeline.fitted import REPLACED_FIELDS, FittedModel, FittedSide, write_fitted
from ray_pipeline.generator.sequence import ShardSequence
from ray_pipeline.knobs import knob_of
from ray_pipeline.verification.audit import PublishedRun
from ray_pipeline.verification.conformance import declared_world

SMALL: dict[str, Any] = {"users": 2_000, "movies": 400, "ratings": 40_000, "start_time_ms": START_MS}

MOVIES_CSV = "movieId,title,genres\n" + "".join(
    f"{n},Film {n},{('Drama', 'War|Western', 'Comedy')[n % 3]}\n" for n in range(1, 421)
)

TURNED: dict[str, Any] = {
    "seed": 43,
    "plan": "ramp(20..300, 100s) then 50 + burst(400 for 5s every 20s)",
    "start_time_ms": START_MS + 1_000,
    "factor_share": 0.6,
    "clock_skew": "1:-30s",
    "silent": "2:every=60s,for=10s",
    "drift": ("abrupt at=20000 size=-0.6 genre=Drama",),
    "attack": ("review-bomb movie=31 at=10000 ratings=1000",),
}
"""Other values of settings for which a generic change does not do."""


def sample_of(**changes: Any) -> Sample:
    return regenerate(World(load_settings(**{**SMALL, **changes})), None, 1_000_000)


@functools.cache
def declared(**changes: Any) -> World:
    return World(load_settings(**{**SMALL, **changes}))


def verdicts(report: ConformanceReport) -> dict[str, str]:
    return {row.name: row.verdict for row in report.checks}


def turned(name: str, base: Settings) -> Any:
    """Another valid value of a setting, half as much again where nothing better is known."""
    if name in TURNED:
        return TURNED[name]
    knob, value = knob_of(name), getattr(base, name)
    if knob.kind == "flag":
        return not value
    if knob.kind == "choice":
        return next(choice for choice in knob.choices if choice != value)
    other = value * 1.5 if value else (knob.high / 2 if knob.high is not None else 1)
    if knob.high is not None and other > knob.high:
        other = value / 2
    return int(other) if knob.kind == "whole" else other


def with_turned(name: str, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Changes to the small world: as it is declared, and as the stream really is."""
    if name == "catalog":
        (tmp_path / "movies.csv").write_text(MOVIES_CSV)
        return {}, {"catalog": tmp_path / "movies.csv"}
    if name == "model":
        write_fitted(tmp_path / "model.npz", small_model())
        return {}, {"users": None, "movies": None, "model": tmp_path / "model.npz"}
    if name == "duration_s":
        return {"ratings": None, "duration_s": 400.0}, {"ratings": None, "duration_s": 500.0}
    if name == "arrival_ratings":
        newcomers = {"new_user_share": 0.5, "new_movie_share": 0.5}
        return {**newcomers, name: 30_000}, {**newcomers, name: 60_000}
    said = BROKEN.get(name, {})
    return said, {**said, name: turned(name, declared(**said).settings)}


BROKEN: dict[str, dict[str, Any]] = {
    **{
        name: {"late_share": 0.2, "late_max_s": 120.0, "disorder_share": 0.2}
        for name in ("late_law", "late_mean_s", "late_max_s", "disorder_s")
    },
    "duplicate_distance": {"duplicate_share": 0.2},
    "future_s": {"future_share": 0.1},
}
"""What must be broken for a setting to show how."""


def small_model() -> FittedModel:
    """Users and movies under ids that no drawn ones have."""
    random = np.random.default_rng(5)
    sides = [
        FittedSide(
            first + np.arange(n, dtype=np.int64),
            random.normal(size=(n, 4)).astype(np.float32),
            random.normal(size=n).astype(np.float32),
            random.integers(1, 100, n),
        )
        for first, n in ((5_000, 300), (1_000, 100))
    ]
    settings = {
        **{name: getattr(load_settings(), name) for name in REPLACED_FIELDS},
        "users": 300,
        "movies": 100,
        "rank": 4,
    }
    whole = random.choice(np.array([0.0, 0.5, 1.0], np.float32), 300)
    settings["whole_star_share"] = float(whole.mean())
    return FittedModel(sides[0], sides[1], whole, tuple(map(str, range(100))), ((),) * 100, settings)


WORKLOADS: list[dict[str, Any]] = [
    {"genre_share": 0.7},
    {"user_scale_sigma": 0.4},
    {"whole_star_share": 0.4},
    {"taste_exposure": 0.7},
    {"session_length": 6.0},
    {"new_user_share": 0.5, "new_movie_share": 0.4, "arrival_ratings": 15_000},
    {"drift": ("gradual from=5000 to=15000 size=-1 genre=Drama", "recurring period=3000 size=1.5 cohort=0.3")},
    {"attack": ("review-bomb movie=31 at=5000 ratings=2000 stealth=0.4 intensity=0.3",)},
]
WORKLOADS.append({name: value for changes in WORKLOADS for name, value in changes.items()})
COVERED = sorted({name for check in CHECKS for name in check.settings})
EXPENSIVE = "identifiability"


def test_every_setting_has_a_check_or_a_reason_why_it_has_none() -> None:
    without = {name for names in NOT_OF_THE_DATA.values() for name in names}
    assert not without & set(COVERED), "a setting is both checked and said to need no check"
    forgotten = set(Settings.model_fields) - without - set(COVERED)
    assert not forgotten, f"add a check to conformance/registry.py for {sorted(forgotten)}, or say why there is none"
    gone = (without | set(COVERED)) - set(Settings.model_fields)
    assert not gone, f"conformance/registry.py names settings that are gone: {sorted(gone)}"
    assert set(EVENT_FIELDS) <= set(COVERED), "what an event is a function of shows in the data"


def test_every_check_judges_a_setting_and_has_a_name_of_its_own() -> None:
    assert all(check.settings for check in CHECKS)
    assert len({check.name for check in CHECKS}) == len(CHECKS)


@pytest.mark.parametrize("name", COVERED)
def test_a_turned_setting_deviates_in_every_check_that_names_it(name: str, tmp_path: Path) -> None:
    said, real = with_turned(name, tmp_path)
    named = checks_of(name)
    checks = tuple(c for c in CHECKS if c.name != EXPENSIVE or c in named)
    world = declared(**said)
    other = judge(Evidence(sample_of(**real), world), "turned", checks)
    right = judge(Evidence(sample_of(**said), world), "right", checks)
    assert right.verdict == "conforms", [row for row in right.checks if row.verdict == "deviates"]
    assert other.verdict == "deviates"
    before = {row.name: row.estimate for row in right.checks}
    for row in other.checks:
        if row.name in {check.name for check in named}:
            assert row.verdict == "deviates", f"{row.name} does not notice {name}: {row}"
            assert row.estimate != before[row.name]


@pytest.mark.parametrize("seed", [1, 2, 3, 2**62])
def test_a_stream_that_is_as_declared_conforms(seed: int) -> None:
    world = World(load_settings(**{**SMALL, "seed": seed}))
    report = judge(Evidence(regenerate(world, None, 1_000_000), world), "right")
    assert report.verdict == "conforms", [row for row in report.checks if row.verdict == "deviates"]
    assert set(verdicts(report).values()) == {"conforms"}


@pytest.mark.parametrize(
    "changes",
    [
        {"user_bias_share": 0.0, "movie_bias_share": 0.0, "factor_share": 0.0},
        {"factor_share": 0.65},
        {"popularity_exponent": 0.0, "activity_sigma": 0.0},
        {"popularity_exponent": 2.5, "activity_sigma": 2.5},
        {"users": 1, "movies": 1, "partitions": 1, "actors": 1},
        {"mean_rating": 0.5, "rating_sd": 0.1},
        {"mean_rating": 5.0, "rating_sd": 5.0},
        {"rate": 1e9},
        {"rate": 0.01},
        {"arrivals": "poisson"},
        {"plan": "loop(ramp(0..500, 30s) then 0 for 5s)"},
        {"plan": "sine(mean=200, amplitude=200, period=20s) + burst(900 for 2s every 9s)", "arrivals": "poisson"},
        {"plan": "100 for 10s", "ratings": None},
        {"ratings": 1},
        {"rank": 1},
        {"rank": 100},
        {"whole_star_share": 1.0},
        {"whole_star_share": 1e-3, "mean_rating": 5.0, "rating_sd": 0.1},
        *WORKLOADS,
    ],
)
def test_no_setting_is_too_extreme_to_be_judged(changes: dict[str, Any]) -> None:
    world = World(load_settings(**{**SMALL, "ratings": 20_000, **changes}))
    checks = tuple(c for c in CHECKS if c.name != EXPENSIVE or {"factor_share", "rating_sd", "rank"} & set(changes))
    report = judge(Evidence(regenerate(world, None, 1_000_000), world), "right", checks)
    assert report.verdict == "conforms", [row for row in report.checks if row.verdict == "deviates"]
    assert all(row.reason for row in report.checks if row.verdict == "unchecked")


@pytest.mark.parametrize("arrivals", ["regular", "poisson"])
def test_rates_are_judged_by_the_records_that_are_on_time(arrivals: str) -> None:
    broken = {**SMALL, "preset": "late-data", "arrivals": arrivals}
    checks = tuple(check for check in CHECKS if check.name in ("start", "rate", "arrivals"))
    world = World(load_settings(**broken))
    assert verdicts(judge(Evidence(regenerate(world, None, 1_000_000), world), "right", checks)) == {
        check.name: "conforms" for check in checks
    }
    other = "poisson" if arrivals == "regular" else "regular"
    for name, value in (("rate", 110.0), ("start_time_ms", START_MS + 1_000), ("arrivals", other)):
        real = World(load_settings(**{**broken, name: value}))
        found = verdicts(judge(Evidence(regenerate(real, None, 1_000_000), world), "turned", checks))
        assert found["start" if name == "start_time_ms" else name] == "deviates", name


def test_a_fitted_model_behaves_as_it_is_told_too(tmp_path: Path) -> None:
    write_fitted(tmp_path / "model.npz", small_model())
    brought = dict.fromkeys(REPLACED_FIELDS)  # None: as the model file says
    changes = {**WORKLOADS[-1], **brought, "model": tmp_path / "model.npz"}
    changes |= {"drift": "abrupt at=9000 movie=1005 size=1", "attack": "review-bomb movie=1001 at=5000 ratings=900"}
    world = World(load_settings(**{**SMALL, "ratings": 20_000, **changes}))
    report = judge(Evidence(regenerate(world, None, 1_000_000), world), "right")
    assert report.verdict == "conforms", [row for row in report.checks if row.verdict == "deviates"]
    with pytest.raises(ConfigurationError, match="genre_share does not go with model"):
        load_settings(**{**changes, "genre_share": 0.5})


REPEATS = tuple(check for check in CHECKS if check.name in ("repeats", "repeat distance"))
CROWDED: dict[str, Any] = {"users": 300, "movies": 200, "rate": 1_000.0, "arrivals": "poisson", "ratings": 100_000}


def alike(sample: Sample) -> int:
    """How many ratings say what another of their partition said before."""
    names = (sample.partition, sample.timestamps_ms, sample.user_ids, sample.movie_ids, sample.half_stars)
    return len(sample) - np.unique(np.stack([column.astype(np.int64) for column in names]), axis=1).shape[1]


def test_honest_ratings_that_are_alike_are_no_repeats() -> None:
    sample = sample_of(**CROWDED)
    report = judge(Evidence(sample, declared(**CROWDED)), "right", REPEATS)
    assert alike(sample) > 3 and report.verdict == "conforms"
    assert [(row.verdict, row.estimate) for row in report.checks] == [("conforms", 0.0)] * 2


def test_twins_of_the_launch_night_are_no_repeats() -> None:
    world = World(load_settings(preset="launch-night", start_time_ms=START_MS))
    events = ShardSequence(world.shard(1), world.schedules[1], 0).events(151_900, 100)
    sample = Sample.of([events], whole=False, source=world)
    assert alike(sample) == 1
    assert judge(Evidence(sample, world), "right", REPEATS).verdict == "conforms"


@pytest.mark.parametrize("rate", [1_000.0, 1e9])
def test_repeats_beyond_those_that_are_alike_by_chance_deviate(rate: float) -> None:
    said = {**CROWDED, "rate": rate, "ratings": 20_000}
    sample = sample_of(**said)
    for one in (5_000, 12_345):  # takes the place of the next rating
        columns = {n: getattr(sample, n).copy() for n in ("user_ids", "movie_ids", "half_stars", "timestamps_ms")}
        for column in columns.values():
            column[one + 1] = column[one]
        report = judge(Evidence(replace(sample, **columns), declared(**said)), "one", REPEATS)
        assert verdicts(report)["repeats"] == "deviates" and report.checks[0].estimate == 1 / 20_000
    other = judge(Evidence(sample_of(**said, duplicate_share=0.01), declared(**said)), "many", REPEATS)
    assert verdicts(other)["repeats"] == "deviates"


@pytest.mark.parametrize("rate", [1e4, 1e5])
def test_shares_and_distances_of_repeats_are_right_also_among_ratings_that_are_alike(rate: float) -> None:
    said = {**CROWDED, "rate": rate, "arrivals": "regular", "duplicate_share": 0.1}
    report = judge(Evidence(sample_of(**said), declared(**said)), "right", REPEATS)
    assert set(verdicts(report).values()) == {"conforms"}, report.checks


@pytest.mark.parametrize("real", [0.35, 0.45])
def test_another_share_of_whole_star_users_shows_either_way(real: float) -> None:
    said = {"whole_star_share": 0.4}
    (check,) = checks_of("whole_star_share")
    report = judge(Evidence(sample_of(whole_star_share=real), declared(**said)), "turned", (check,))
    assert report.verdict == "deviates"
    # one half star of somebody who gives none is too many
    sample, world = sample_of(**said), declared(**said)
    whole = world.users.habits.whole[world.user_at(sample.user_ids)]
    half_stars = sample.half_stars.copy()
    half_stars[np.flatnonzero(whole)[100]] -= 1
    assert judge(Evidence(sample, world), "right", (check,)).verdict == "conforms"
    assert judge(Evidence(replace(sample, half_stars=half_stars), world), "one", (check,)).verdict == "deviates"


def test_many_checks_do_not_make_a_false_alarm_likely() -> None:
    assert holm({"a": 0.0004, "b": 0.0006, "c": 0.5}, 0.001) == set()
    assert holm({"a": 0.0003, "b": 0.0004, "c": 0.5}, 0.001) == {"a", "b"}
    assert holm({}, 0.001) == set()


def test_estimates_are_as_far_off_as_they_say() -> None:
    """Over many seeds, (estimate - truth) / error has variance 1."""
    checks = [c for c in CHECKS if c.name in ("activity", "popularity", "mean", "spread", "factors", "movie bias")]
    found: dict[str, list[float]] = {check.name: [] for check in checks}
    for seed in range(60):
        world = World(load_settings(**{**SMALL, "users": 300, "movies": 100, "ratings": 5_000, "seed": seed}))
        evidence = Evidence(regenerate(world, None, 5_000), world)
        for check in checks:
            measure = check.measure(evidence)
            assert isinstance(measure, Estimate)
            found[check.name].append((measure.value - measure.declared) / measure.error)
    for name, z in found.items():
        assert 0.6 < np.std(z) < 1.4, name
        assert abs(np.mean(z)) < 0.5, name


@pytest.mark.parametrize(
    ("changes", "events", "seeds"),
    [
        ({"session_length": 8.0}, 20_000, 12),
        (
            {"users": 3_000, "movies": 400, "new_user_share": 0.9, "new_movie_share": 0.9, "arrival_ratings": 4_000},
            5_000,
            24,
        ),
        ({"users": 3_000, "movies": 400, "taste_exposure": 1.0, "session_length": 20.0}, 5_000, 12),
    ],
)
def test_distinct_users_and_movies_are_as_far_off_as_they_say(changes: dict[str, Any], events: int, seeds: int) -> None:
    found: dict[str, list[float]] = {"distinct users": [], "distinct movies": []}
    checks = [check for check in CHECKS if check.name in found]
    for seed in range(seeds):
        world = World(load_settings(seed=seed, **changes))
        evidence = Evidence(regenerate(world, events, events), world)
        for check in checks:
            measure = check.measure(evidence)
            assert isinstance(measure, Estimate)
            found[check.name].append((measure.value - measure.declared) / measure.error)
    for name, z in found.items():
        assert np.abs(z).max() < 4.2 and np.std(z) < 1.6, name


@pytest.mark.parametrize(
    "changes",
    [
        {"rating_sd": 0.001},
        {"rating_sd": 0.07},
        {"rating_sd": 0.02, "user_scale_sigma": 0.5},
        {"rating_sd": 0.001, "mean_rating": 4.75},
        {"rating_sd": 0.01, "whole_star_share": 1.0},
    ],
)
def test_what_hardly_differs_is_not_called_wrong(changes: dict[str, Any]) -> None:
    checks = tuple(c for c in CHECKS if c.name != EXPENSIVE)
    for seed in (2, 3, 9):
        said = {"users": 3_000, "ratings": 20_000, "seed": seed, **changes}
        report = judge(Evidence(sample_of(**said), declared(**said)), "right", checks)
        assert report.verdict == "conforms", [row for row in report.checks if row.verdict == "deviates"]
        alike = "mean_rating" not in changes and "whole_star_share" not in changes
        assert (verdicts(report)["spread"] == "unchecked") is alike


@pytest.mark.parametrize("changes", [{"mean_rating": 8.0, "rating_sd": 3.0}, {"rating_sd": 20.0}])
def test_factors_that_most_ratings_cannot_say_are_not_asked_for(changes: dict[str, Any]) -> None:
    said = {"users": 3_000, "ratings": 20_000, **changes}
    checks = tuple(c for c in CHECKS if c.name == EXPENSIVE)
    (row,) = judge(Evidence(sample_of(**said), declared(**said)), "right", checks).checks
    assert row.verdict == "unchecked" and "cut off" in row.reason


def test_a_difference_that_a_law_does_not_allow_is_infinitely_unlikely() -> None:
    law = np.array([0.5, 0.5, 0.0])
    covariance = 100 * (np.diag(law) - np.outer(law, law))
    fair, degrees = quadratic(np.array([5.0, -5.0, 0.0]), covariance)
    assert (fair, degrees) == (pytest.approx(1.0), 1)
    assert quadratic(np.array([5.0, -6.0, 1.0]), covariance)[0] == np.inf


def test_a_seed_that_is_another_shows_whatever_else_is_right() -> None:
    checks = tuple(c for c in CHECKS if c.name != EXPENSIVE)
    report = judge(Evidence(sample_of(seed=43), declared()), "other", checks)
    row = next(row for row in report.checks if row.name == "seed")
    assert row.verdict == "deviates" and row.estimate is not None and row.estimate < 0.01


def test_a_run_in_kafka_is_judged_by_what_it_published(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"state": "stopped", "base": 0, "delivered": 40_000, "requested": 40_000}
    monkeypatch.setattr("ray_pipeline.verification.conformance.newest_of_key", lambda *_: json.dumps(said).encode())
    ours, theirs = load_settings(**{**SMALL, "rate": 7, "ratings": 3}), declared(rate=50)
    progress = {
        p: ShardProgress("run", "config", p, 1, START_MS, 0, s.plan.epochs, s.share, s.phase)
        for p, s in theirs.schedules.items()
    }
    world = declared_world(PublishedRun(ours, {"run": "run"}, None, progress, ()), "nowhere:9092")
    assert (world.settings.rate, world.declared_total, world.start_ms) == (50.0, 40_000, START_MS)
    said["delivered"] = 39_999  # stopped by somebody: no end of its own
    assert declared_world(PublishedRun(ours, {"run": "run"}, None, progress, ()), "").declared_total is None
    del progress[1]
    with pytest.raises(UncheckedError, match="partition 1"):
        declared_world(PublishedRun(ours, {"run": "run"}, None, progress, ()), "")


def test_every_record_is_counted_repeats_and_broken_ones_too() -> None:
    broken = {"duplicate_share": 0.1, "malformed_share": 0.1}
    report = judge(Evidence(sample_of(**broken), declared(**broken)), "made anew", CHECKS[:1])
    assert report.events + report.unreadable == SMALL["ratings"]
    assert report.unreadable == pytest.approx(4_000, rel=0.1)


def test_the_page_is_one_file_that_needs_nothing_else() -> None:
    late = {"late_share": 0.1}
    evidence = Evidence(sample_of(**late), declared(**late))
    page = render_page(evidence, judge(evidence, "made anew"))
    assert page.count("<svg") == 7
    assert not re.search(r"""(src|href)\s*=\s*["'](?!\#)""", page), "nothing is fetched"
    assert "@import" not in page and "url(http" not in page
    assert "prefers-color-scheme: dark" in page and "#040506" not in page
    for check in CHECKS:
        assert f"<td>{check.name}</td>" in page


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--events", "3000"], 0, "3,000 ratings, made anew: conforms"),
        (["--events", "0"], 2, "--events"),
        (["--events", "10", "--topic", "ratings"], 2, "exclude each other"),
        (["--events", "10", "--report", "/nowhere/report.html"], 2, "no folder /nowhere"),
        (["--events", "3000", "--report", "/dev/full"], 3, "3,000 ratings, made anew: conforms"),
        (["--topic", "ratings"], 2, "nothing has run"),
    ],
)
def test_the_command_ends_with_what_it_found(
    arguments: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_pipeline.command.options.configure_logging", lambda _: None)
    size = ["--users", "500", "--movies", "100", "--state-dir", str(tmp_path / "state")]
    done = CliRunner().invoke(app, ["conformance", *size, *arguments])
    assert done.exit_code == code, done.output
    assert said in done.output


def test_json_has_a_row_for_each_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_pipeline.command.options.configure_logging", lambda _: None)
    done = CliRunner().invoke(app, ["conformance", "--events", "2000", "--json", "--state-dir", str(tmp_path)])
    found = json.loads(done.output)
    assert [row["name"] for row in found["checks"]] == [check.name for check in CHECKS]
    assert {"verdict", "events", "unreadable", "source", "config", "family_wise_error", "duration_s"} < set(found)


@pytest.mark.parametrize(
    ("check", "setting"),
    [
        ("popularity", "popularity_exponent"),
        ("activity", "activity_sigma"),
        ("mean", "mean_rating"),
        ("spread", "rating_sd"),
        ("user bias", "user_bias_share"),
        ("movie bias", "movie_bias_share"),
        ("factors", "factor_share"),
    ],
)
def test_a_difference_that_is_called_detectable_is_detected(check: str, setting: str) -> None:
    checks = tuple(c for c in CHECKS if c.name != EXPENSIVE)
    row = next(r for r in judge(Evidence(sample_of(), declared()), "right", checks).checks if r.name == check)
    assert row.detectable is not None and row.estimate is not None and row.declared is not None
    # beside what is detectable, half of the distance that chance has put between this sample and its own setting
    other = row.declared + row.detectable + abs(row.estimate - row.declared) / 2
    report = judge(Evidence(sample_of(**{setting: other}), declared()), "a little off", checks)
    assert verdicts(report)[check] == "deviates"


BENT: dict[str, Any] = {
    "taste_exposure": 0.7,
    "session_length": 3.0,
    "new_user_share": 0.4,
    "new_movie_share": 0.4,
    "arrival_ratings": 15_000,
}


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("popularity", {"popularity_exponent": 1.2}),
        ("genres", {"popularity_exponent": 1.4}),
        ("activity", {"activity_sigma": 0.9}),
        ("distinct users", {"activity_sigma": 2.0}),
        ("distinct movies", {"popularity_exponent": 1.6}),
    ],
)
def test_the_laws_are_judged_also_where_other_settings_bend_them(check: str, change: dict[str, float]) -> None:
    checks = tuple(c for c in CHECKS if c.name != EXPENSIVE)
    report = judge(Evidence(sample_of(**BENT, **change), declared(**BENT)), "bent", checks)
    assert verdicts(report)[check] == "deviates"
    assert judge(Evidence(sample_of(**BENT), declared(**BENT)), "right", checks).verdict == "conforms"
