"""A model of one's own ratings, by Spark's ALS as a user starts it, and an audited stream from it on a real broker."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from ray_pipeline.config import load_settings
from ray_pipeline.kafka.read import read_topic
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.truth.replay import build_models
from tests.conftest import command

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ratings of a known world in MovieLens's layout."""
    folder = tmp_path_factory.mktemp("fit")
    small = {"users": 400, "movies": 150, "rank": 2, "partitions": 1, "actors": 1}
    world = load_settings(**small, activity_sigma=0.5, whole_star_share=0.4)
    catalogue = load_catalogue(world)
    drawn = build_models(world, catalogue, [0])[0].draw(0, 40_000)
    ids = drawn.user_ids + 5_000, drawn.movie_ids * 10
    times = np.arange(40_000) + 1_600_000_000
    columns = {"userId": ids[0], "movieId": ids[1], "rating": drawn.half_stars / 2, "timestamp": times}
    pyarrow.csv.write_csv(pa.table(columns), folder / "ratings.csv")
    rows = [f'{10 * i},"{title}",{"|".join(genres)}' for i, title, genres in zip(
        catalogue.movie_ids.tolist(), catalogue.titles, catalogue.genres, strict=True)]  # fmt: skip
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def fitted(folder: Path) -> dict[str, Any]:
    return fit(folder, "model.npz")


def fit(folder: Path, name: str) -> dict[str, Any]:
    files = folder / "ratings.csv", "--movies", folder / "movies.csv", "-o", folder / name
    done = command("fit", *files, "--rank", "2", "--seed", "7", "--json", timeout_s=150)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "read 40,000 ratings of 400 users and 150 movies" in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_spark_finds_the_factors_and_the_same_ones_again(folder: Path, fitted: dict[str, Any]) -> None:
    rmse = fitted["report"]["rmse"]
    assert rmse["model"] < 0.92 * rmse["bias_only"] < 0.92 * rmse["global_mean"]
    assert fitted["report"]["noise_sd"] == pytest.approx(1.1 * 0.3**0.5, rel=0.12)
    assert fitted["settings"]["factor_share"] == pytest.approx(0.35, abs=0.08)
    assert fitted["settings"]["whole_star_share"] == pytest.approx(0.4, abs=3 * fitted["report"]["whole_star_error"])
    assert 0.02 < fitted["report"]["whole_star_error"] < 0.03 and 0.65 < fitted["report"]["whole_ratings"] < 0.75
    again = fit(folder, "again.npz")
    assert again["digest"] == fitted["digest"]
    assert (folder / "again.npz").read_bytes() == (folder / "model.npz").read_bytes()


def test_damaged_ratings_name_the_line_and_leave_nothing(tmp_path: Path, folder: Path) -> None:
    text = (folder / "ratings.csv").read_text().splitlines()
    (tmp_path / "bad.csv").write_text("\n".join([*text[:900], "5001,20,9.5,1600000000", *text[900:]]))
    done = command("fit", tmp_path / "bad.csv", "-o", tmp_path / "model.npz")
    assert done.returncode == 2
    assert "line 901: rating '9.5' is not one of 0.5, 1.0, … 5.0 stars" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["bad.csv"]


def half_givers(ratings: list[dict[str, Any]]) -> set[int]:
    return {r["userId"] for r in ratings if r["rating"] % 1}


def test_a_stream_from_the_model_is_audited_with_it_and_not_without(
    broker: str, folder: Path, fitted: dict[str, Any], tmp_path: Path
) -> None:
    topics = [
        part
        for kind in ("ratings", "progress", "control", "metrics", "job", "batches", "expected", "rejected")
        for part in (f"--{kind}-topic", f"fitted.{kind}")
    ]
    at = ["--bootstrap-servers", broker, "--state-dir", tmp_path, *topics]
    model = folder / "model.npz"
    sent = command("generate", *at, "--model", model, "--ratings", "3000", "--rate", "3000", timeout_s=150)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    ratings = [json.loads(r.value or b"") for r in read_topic(broker, "fitted.ratings")]
    assert len(ratings) == 3000
    given = pyarrow.csv.read_csv(folder / "ratings.csv").select(["userId", "rating"]).to_pylist()
    assert {r["movieId"] for r in ratings} <= set(range(10, 1510, 10))
    assert {r["userId"] for r in ratings} <= set(range(5_001, 5_401))
    assert half_givers(ratings) <= half_givers(given), "who gave whole stars only does so in the stream"
    moved = shutil.copy(model, tmp_path / "elsewhere.npz")
    agreed = command("audit", *at, "--model", moved, "--json")
    assert (agreed.returncode, json.loads(agreed.stdout)["records"]["found"]) == (0, 3000), agreed.stdout
    without = command("audit", *at)
    assert without.returncode == 2
    assert f"from a fitted model ({fitted['digest']}), and none is given" in without.stdout
    explained = command("explain", *at, "--model", moved, "--partition", "0", "--index", "0", "--json")
    found = json.loads(explained.stdout)
    assert found["kafka"]["agrees"] and found["movie"]["genres"]
