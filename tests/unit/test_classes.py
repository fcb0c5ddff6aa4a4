"""Archives of loaded classes: a JVM is given one that is of just its Java and its files, and none otherwise."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from spark_compat import classes
from spark_compat.classes import ClassArchive, names_of, remove_orphans
from spark_compat.errors import SparkCompatError
from spark_compat.jvm import Java


def dump(command: list[str], **_: Any) -> None:
    """What ``java -Xshare:dump`` does."""
    (file,) = (option.partition("=")[2] for option in command if option.startswith("-XX:SharedArchiveFile="))
    Path(file).write_text("classes")


def refuse(command: list[str], **_: Any) -> None:
    raise subprocess.CalledProcessError(1, command, "", "Unrecognized option: -Xshare:dump")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(classes.platformdirs, "user_cache_dir", lambda _: str(folder))
    return folder


@pytest.fixture
def java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Java:
    home = tmp_path / "java"
    (home / "lib" / "server").mkdir(parents=True)
    (home / "lib" / "server" / "libjvm.so").touch()
    monkeypatch.setattr(classes.subprocess, "run", dump)
    return Java(home, 17)


@pytest.fixture
def jars(tmp_path: Path) -> list[str]:
    (tmp_path / "spark").mkdir()
    for name in ("raydp.jar", "spark/one.jar", "spark/two.jar"):
        (tmp_path / name).write_text(name)
    return [str(tmp_path / "raydp.jar"), str(tmp_path / "spark" / "*")]


def test_a_jvm_is_given_the_archive_once_it_was_made(java: Java, jars: list[str], cache: Path) -> None:
    archive = ClassArchive("spark", java, jars)
    assert archive.options() == []
    archive.make()
    assert archive.options() == [f"-XX:SharedArchiveFile={archive.file}"]
    assert archive.file.read_text() == "classes"
    assert {file.suffix for file in cache.iterdir()} == {".jsa", ".json"}  # what the making took is gone


@pytest.mark.parametrize("changed", ["java/lib/server/libjvm.so", "raydp.jar", "spark/two.jar", "spark/three.jar"])
def test_it_is_not_given_to_a_jvm_of_other_files(java: Java, jars: list[str], tmp_path: Path, changed: str) -> None:
    archive = ClassArchive("spark", java, jars)
    archive.make()
    (tmp_path / changed).write_text("another version")
    assert archive.options() == [] and not archive.is_made()
    archive.make()
    assert archive.is_made()


def test_another_order_of_the_same_jars_is_another_classpath(java: Java, jars: list[str]) -> None:
    ClassArchive("spark", java, jars).make()
    assert not ClassArchive("spark", java, jars[::-1]).is_made()
    assert not ClassArchive("kafka", java, jars).is_made()


def test_a_java_that_cannot_make_one_is_told_of_and_leaves_nothing(
    java: Java, jars: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classes.subprocess, "run", refuse)
    archive = ClassArchive("spark", java, jars)
    with pytest.raises(SparkCompatError, match=r"classes of spark.*Unrecognized option.*starts take some seconds more"):
        archive.make()
    assert archive.options() == [] and not list(cache.iterdir())


def test_a_cache_whose_path_options_cannot_hold_is_not_used(
    java: Java, jars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classes.platformdirs, "user_cache_dir", lambda _: str(tmp_path / "a b"))
    archive = ClassArchive("spark", java, jars)
    archive.make()
    assert archive.is_made() and archive.options() == []


def test_archives_of_installations_that_are_gone_are_removed(
    java: Java, jars: list[str], tmp_path: Path, cache: Path
) -> None:
    kept, gone = ClassArchive("spark", java, jars), ClassArchive("spark", java, jars[:1])
    other = tmp_path / "venv.jar"
    other.touch()
    orphan = ClassArchive("spark", java, [str(other)])
    for archive in (kept, gone, orphan):
        archive.make()
    other.unlink()
    remove_orphans()
    assert kept.is_made() and gone.is_made() and not orphan.file.exists()
    assert len(os.listdir(cache)) == 4


def test_names_of_several_jvms_are_one_list_of_what_every_jvm_can_load() -> None:
    one = ["# a comment", "java/lang/Object id: 0", "@lambda-proxy a/B run ()V", "jdk/proxy1/$Proxy3 id: 4"]
    two = ["java/lang/Object id: 0", "a/Made id: 7 super: 0 source: a.jar", "a/B id: 3", "@lambda-proxy a/B run ()V"]
    assert names_of([*one, *two]) == ["java/lang/Object", "@lambda-proxy a/B run ()V", "a/B"]
