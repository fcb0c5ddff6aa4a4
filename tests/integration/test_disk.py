"""Full disks and broken files: the cause is named, and nothing is skipped when it is gone. The disk is a small tmpfs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.config import Settings, load_settings
from ray_pipeline.errors import CheckpointError
from ray_pipeline.kafka.client import make_producer
from ray_pipeline.kafka.topics import ensure_topics
from ray_pipeline.windows.sink import BatchSink
from ray_pipeline.windows.stage import WindowStage
from tests.conftest import clean_environment, command, wait_for

pytestmark = pytest.mark.timeout(300)

T0 = 1_700_000_040_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes file systems of so many MiB; needs root, or sudo without a password, to mount them."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    mounted: list[Path] = []

    def make(mib: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        options = f"size={mib}m,mode=0700,uid={os.geteuid()}"
        subprocess.run([*sudo, "mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run([*sudo, "umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """Take all the space; removing the file gives it back."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    assert shutil.disk_usage(disk).free < 1 << 16
    return ballast


# -- the checkpoint


def job_settings(name: str, broker: str, checkpoint: Path) -> Settings:
    topics = ("ratings", "metrics", "rejected", "progress", "control", "job")
    names = {f"{topic}_topic": f"{name}.{topic}" for topic in topics}
    found = load_settings(checkpoint=checkpoint.as_uri(), partitions=1, actors=1, top_n=5, watermark_s=60, **names)
    ensure_topics(found, broker)
    return found


def send(settings: Settings, broker: str, first: int, count: int) -> None:
    producer = make_producer(broker)
    for n in range(first, first + count):
        value = f'{{"userId":{n + 1},"movieId":{n % 50 + 1},"rating":3.0,"timestamp":{T0 + n * 10}}}'
        producer.produce(settings.ratings_topic, key=str(n + 1), value=value, partition=0)
    assert producer.flush(30) == 0


@contextlib.contextmanager
def job(settings: Settings, broker: str) -> Iterator[WindowStage]:
    stage = WindowStage(settings, broker, master="local[2]")
    try:
        stage.start()
        yield stage
    finally:
        stage.stop()


def all_counted(stage: WindowStage, count: int) -> bool:
    said = stage.status()
    return (said.get("valid"), said.get("counted"), said.get("late_dropped")) == (count, count, 0)


def full(stage: WindowStage) -> dict[str, Any] | None:
    """What it says when it says that a disk is full: between two attempts, so a moment later it may not."""
    said = stage.status()
    return said if "a disk is full" in said["reason"] else None


def remove(checkpoint: Path, name: str) -> None:
    file = checkpoint / name
    file.unlink(missing_ok=True)
    file.with_name(f".{file.name}.crc").unlink(missing_ok=True)


def cut_off(file: Path, share: float) -> None:
    """As a crash of the machine leaves it: the checksum file beside may be whole, or cut off as well."""
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    file.with_name(f".{file.name}.crc").unlink(missing_ok=True)


def newest(folder: Path) -> int:
    return max(int(file.name.split(".")[0]) for file in folder.iterdir() if file.name[0].isdigit())


def test_a_broken_newest_file_is_named_and_the_way_out_skips_nothing(broker: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    settings = job_settings("cutoff", broker, checkpoint)
    sent = 0
    for where, share in (("offsets", 0.5), ("commits", 0.0), ("state", 0.5)):
        with job(settings, broker) as stage:
            for _ in range(2):
                send(settings, broker, sent, 300)
                sent += 300
                assert stage.drain(60)
            wait_for("all to be counted", lambda stage=stage, sent=sent: all_counted(stage, sent))
        batch = newest(checkpoint / "commits")
        if where == "state":
            cut_off(checkpoint / "state" / "0" / "0" / f"{batch + 1}.changelog", share)
        else:
            cut_off(checkpoint / where / str(batch), share)
        with pytest.raises(CheckpointError) as refused, job(settings, broker):
            pass
        assert str(checkpoint) in refused.value.problem and str(batch) in refused.value.problem
        assert f"commits/{batch}" in refused.value.fix and "nothing is skipped" in refused.value.fix
        remove(checkpoint, f"commits/{batch}")
        if where == "offsets":
            remove(checkpoint, f"offsets/{batch}")
    with job(settings, broker) as stage:
        assert stage.drain(60)
        assert all_counted(stage, sent), stage.status()


def test_a_full_disk_of_the_checkpoint_is_named_and_nothing_is_skipped(
    broker: str, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(16)
    settings = job_settings("full", broker, disk / "checkpoint")
    with job(settings, broker) as stage:
        send(settings, broker, 0, 300)
        # counted is before committed: a disk that is full in between is another case
        wait_for("all to be committed", lambda: stage.drain(60) and all_counted(stage, 300))
        ballast = fill(disk)
        send(settings, broker, 300, 300)
        said = wait_for("the cause to be named", lambda: full(stage))
        assert str(disk) in said["reason"] and said["counted"] == 300
        ballast.unlink()
        wait_for("all to be counted", lambda: all_counted(stage, 600))
        assert (stage.status()["state"], stage.status()["reason"]) == ("running", "")


def test_a_batch_that_was_published_and_could_not_be_committed_is_counted_once(
    broker: str, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(16)
    settings = job_settings("uncommitted", broker, disk / "checkpoint")
    ballast: list[Path] = []
    publish = BatchSink.__call__

    def publish_and_fill(sink: BatchSink, frame: object, batch: int) -> None:
        publish(sink, frame, batch)
        if sink.totals()["counted"] and not ballast:
            ballast.append(fill(disk))

    monkeypatch.setattr(BatchSink, "__call__", publish_and_fill)
    with job(settings, broker) as stage:
        send(settings, broker, 0, 300)
        wait_for("the cause to be named", lambda: full(stage))
        send(settings, broker, 300, 300)
        ballast[0].unlink()
        wait_for("all to be counted", lambda: stage.drain(60) and all_counted(stage, 600))


# -- the broker

GENERATE = """
import sys, time
from ray_pipeline import Pipeline
from ray_pipeline.errors import RayPipelineError

try:
    with Pipeline(stages=("generate",), state_dir=sys.argv[1], rate=2000, on_event=print, **eval(sys.argv[2])) as pipeline:
        while not pipeline.status().delivered:
            time.sleep(0.05)
        print("up", flush=True)
        pipeline.wait()
except RayPipelineError as error:
    sys.exit(str(error))
"""


def generate(state_dir: Path, **settings: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", GENERATE, str(state_dir), repr(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environment(),
    )


def test_a_full_disk_of_the_broker_ends_the_run_with_the_cause_and_the_next_run_sends_what_it_lost(
    small_disk: Callable[[int], Path],
) -> None:
    state_dir = small_disk(400)
    process = generate(state_dir)
    assert process.stdout is not None
    try:
        assert any(line == "up\n" for line in process.stdout)
        ballast = fill(state_dir)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1, said
    # said at once, and what the run ends with: nobody waits for the stop timeout to commit to a broker that is given up
    assert said.count("the disk of the broker's data is full") >= 2 and "Free some space" in said, said
    assert "is back" not in said, said
    looked = command("doctor", "--state-dir", state_dir)
    assert "Free some space" in looked.stdout
    ballast.unlink()
    process = generate(state_dir, duration_s=3)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    audited = command("audit", "--json", "--state-dir", state_dir)
    records = json.loads(audited.stdout)["records"]
    # a broker whose disk is full may lose what it had acknowledged, of one partition and not of another: shards find out
    assert audited.returncode == 0, audited.stdout
    assert (records["missing"], records["repeated"]) == (0, 0)
    assert records["found"] == records["expected"] > 6000
