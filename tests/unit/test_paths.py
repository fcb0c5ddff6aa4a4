"""Folders with spaces and other letters in their names: what Spark and the broker are told is the folder itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_pipeline.config import load_settings
from ray_pipeline.errors import EnvironmentProblem
from ray_pipeline.kafka import broker
from ray_pipeline.kafka.broker import EmbeddedBroker
from spark_compat.conf import spark_conf
from spark_compat.paths import hadoop_uri, local_path, plain_uri

ODD = "a b é/50%20 off #1: [x]"


@pytest.mark.parametrize("folder", ["/home/me/.local/state/ray-pipeline_2-x~", f"/home/{ODD}"])
def test_an_address_is_the_path_as_it_stands_and_leads_back_to_it(folder: str) -> None:
    uri = hadoop_uri(Path(folder))
    assert uri == f"file://{folder}" and local_path(uri) == Path(folder)
    assert local_path(f"file:{folder}") == Path(folder)  # so too where somebody writes it by hand


def test_other_file_systems_have_no_local_path() -> None:
    assert local_path("hdfs://namenode:8020/x") is None and local_path("/data/x") is None


def test_a_reader_that_quotes_is_given_a_link(tmp_path: Path) -> None:
    (tmp_path / ODD).mkdir(parents=True)
    (tmp_path / ODD / "there").touch()
    with plain_uri(hadoop_uri(tmp_path / ODD)) as address:
        path = local_path(address)
        assert path is not None and path.as_uri() == address and (path / "there").is_file()
    assert not path.exists() and (tmp_path / ODD / "there").is_file()
    for as_it_is in (hadoop_uri(tmp_path), "hdfs://namenode:8020/a b"):
        with plain_uri(as_it_is) as address:
            assert address == as_it_is


def test_the_checkpoint_and_the_pools_are_where_the_folder_is(tmp_path: Path) -> None:
    settings = load_settings(state_dir=tmp_path / ODD)
    assert local_path(settings.checkpoint_uri) == tmp_path / ODD / "checkpoint"
    assert local_path(settings.archive_checkpoint_uri) == tmp_path / ODD / "checkpoint-archive"
    conf = spark_conf(jars=(), fair_scheduler_file=tmp_path / ODD / "pools.xml", shuffle_partitions=2)
    assert local_path(conf["spark.scheduler.allocation.file"]) == tmp_path / ODD / "pools.xml"


@pytest.mark.parametrize("name", ["plain", ODD, "back\\slash \U0001f3ac"])
def test_the_broker_reads_its_folder_out_of_the_properties(tmp_path: Path, name: str) -> None:
    embedded = EmbeddedBroker(tmp_path / name)
    embedded._folder.mkdir(parents=True)
    content = embedded._write_properties().read_bytes()
    (line,) = (line for line in content.splitlines() if line.startswith(b"log.dirs="))
    # as Java does it: one byte a letter, and the escapes of its strings, in UTF-16
    read = line.removeprefix(b"log.dirs=").decode("unicode_escape").encode("utf-16", "surrogatepass").decode("utf-16")
    assert read == f"{tmp_path / name}/broker/data" and content.isascii()


def test_a_path_that_the_broker_takes_for_two_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "find_java", lambda: type("Java", (), {"executable": "java"}))
    monkeypatch.setattr(broker, "kafka_broker_jars", lambda: [])
    with pytest.raises(EnvironmentProblem, match=r"has a comma.*--state-dir"):
        EmbeddedBroker(tmp_path / "a,b").start()
    assert not (tmp_path / "a,b").exists()
