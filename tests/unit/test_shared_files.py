"""Files for actors on other nodes: they get the driver's very content, whatever lies at the path there."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from ray_pipeline.cluster import kept
from ray_pipeline.cluster.files import SharedFiles
from ray_pipeline.config import load_settings
from ray_pipeline.errors import EnvironmentProblem
from ray_pipeline.model.catalogue import load_catalogue


@pytest.fixture(autouse=True)
def object_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        kept, "ray", SimpleNamespace(put=lambda value: value, get=lambda value: value, cloudpickle=pickle)
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_an_actor_takes_the_file_where_it_is_and_else_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "movies.csv"
    path.write_text("movieId,title,genres\n7,Heat,Crime\n")
    settings = load_settings(catalog=path)
    shared = SharedFiles.of(settings)
    assert shared.at_hand(settings) == settings
    digest = load_catalogue(settings).digest
    path.write_text("movieId,title,genres\n8,Other,Crime\n")
    changed = shared.at_hand(settings)
    assert load_catalogue(changed).digest == digest
    path.unlink()
    assert shared.at_hand(settings).catalog == changed.catalog != path
    assert len(list(tmp_path.iterdir())) == 1


def test_without_files_nothing_is_shared() -> None:
    assert SharedFiles.of(load_settings()).held == {}


def test_a_copy_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "movies.csv"
    path.write_text("movieId,title,genres\n7,Heat,Crime\n")
    settings = load_settings(catalog=path)
    shared = SharedFiles.of(settings)
    path.unlink()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(EnvironmentProblem, match="TMPDIR"):
        shared.at_hand(settings)
