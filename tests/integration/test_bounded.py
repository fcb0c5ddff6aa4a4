"""Bounded runs, a second run on the same state, the same bytes from any number of actors, stages on their own, the Python API."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from ray_pipeline.codec import encode_values
from ray_pipeline.config import load_settings
from ray_pipeline.delivery.interface import Epoch
from ray_pipeline.generator.plan import RatePlan, ShardSchedule
from ray_pipeline.generator.sequence import ShardSequence
from ray_pipeline.kafka.read import count_records, read_compacted, read_topic
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.population import build_user_map
from ray_pipeline.state import broker_for_reading
from ray_pipeline.truth.replay import build_models
from spark_compat.paths import hadoop_uri
from tests.conftest import Running, clean_environment, command, python, wait_for

pytestmark = pytest.mark.timeout(400)

START_MS = 1_700_000_000_000


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a name that Java, Spark and Kafka each read in a way of their own."""
    folder = tmp_path_factory.mktemp("bounded") / "a b é"
    folder.mkdir()
    return folder


def test_a_bounded_run_delivers_exactly_what_was_asked_and_counts_it(state_dir: Path) -> None:
    summary = state_dir / "summary.json"
    done = command(
        "run",
        *("--ratings", "5000", "--rate", "2500", "--no-ui", "--api-port", "0", "--start-time", str(START_MS)),
        *("--backfill", "3000", "--archive", hadoop_uri(state_dir / "archive")),
        *("--state-dir", state_dir, "--summary-json", summary),
        timeout_s=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(summary.read_text())
    assert list(found) == [
        "requested",
        "delivered",
        "counted",
        "late_dropped",
        "rejected",
        "windows",
        "first_window_s",
        "duration_s",
        "stages",
    ]
    assert (found["requested"], found["delivered"], found["counted"]) == (5000, 5000, 5000)
    assert (found["late_dropped"], found["rejected"]) == (0, 0)
    assert found["windows"] == 1 and 0 < found["first_window_s"] <= found["duration_s"]
    assert {"imports", "broker", "ray", "spark", "generator", "serving", "backfill", "first window"} <= set(
        found["stages"]
    )
    assert not list((state_dir / "runs").iterdir())
    assert "backfill: 3,000 ratings sent" in done.stdout


def test_history_by_spark_and_live_ratings_by_actors_are_one_stream(state_dir: Path) -> None:
    """As actors alone would have sent it: by the plan that the settings say, not by what the run says of itself."""
    audit = command("audit", "--json", "--state-dir", state_dir)
    assert audit.returncode == 0, audit.stdout
    settings = load_settings()
    models = build_models(settings, load_catalogue(settings), range(4))
    settings_say = RatePlan([Epoch(START_MS, 2500.0)])
    user_map = build_user_map(settings)
    with broker_for_reading(load_settings(state_dir=state_dir)) as bootstrap:
        sent = defaultdict(list)
        for record in read_topic(bootstrap, "ratings"):
            sent[record.partition].append(record.value)
    for p, values in sent.items():
        schedule = ShardSchedule(settings_say, user_map.share(p), (p + 0.5) / 4)
        assert values == encode_values(ShardSequence(models[p], schedule, 0).events(0, len(values)))
    rows = pd.read_parquet(state_dir / "archive" / "ratings")
    assert len(rows) == 5000 and rows["date"].astype(str).unique().tolist() == ["2023-11-14"]
    windows = pd.read_parquet(state_dir / "archive" / "windows")
    assert windows.loc[windows["window_type"] == "tumbling_1min", "count"].sum() == 5000


def test_reading_commands_start_the_broker_of_a_run_that_has_ended(state_dir: Path) -> None:
    assert "Total: 5000" in command("topics", "count", "ratings", "--state-dir", state_dir).stdout
    report = command("batch", "--json", "--state-dir", state_dir)
    assert report.returncode == 0, report.stderr
    assert json.loads(report.stdout)["total"] == 5000
    archive = ("--from-archive", "--archive", hadoop_uri(state_dir / "archive"))
    archived = command("batch", "--json", *archive, "--state-dir", state_dir)
    assert archived.returncode == 0, archived.stderr
    same = ("histogram", "top_movies", "genres", "total")
    assert [json.loads(archived.stdout)[n] for n in same] == [json.loads(report.stdout)[n] for n in same]


def test_a_second_run_goes_on_where_the_first_stopped_until_it_is_stopped_by_name(state_dir: Path) -> None:
    program = f"""
from pathlib import Path
from ray_pipeline import Pipeline
with Pipeline(state_dir=Path({str(state_dir)!r}), rate=150, ui=False, api_port=0) as p:
    p.set_rate(300)
    assert p.wait()
    print("METRICS", p.metrics()["status"], p.generator_status()["base"])
    print("SUMMARY", __import__("json").dumps(p.stop().as_dict()))
"""
    running = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=clean_environment()
    )
    try:
        wait_for("the start", (state_dir / "runs" / f"{running.pid}.json").is_file, 150)
        state = ("--state-dir", state_dir)
        jobs = json.loads(command("jobs", "list", "--json", *state).stdout)
        assert len(jobs) == 1 and jobs[0]["job"]["state"] == "running"
        done = command("jobs", "stop", jobs[0]["name"], *state)
        assert done.returncode == 0, done.stderr
        output, _ = running.communicate(timeout=120)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 0
    lines = dict(line.split(" ", 1) for line in output.splitlines() if line.startswith(("METRICS", "SUMMARY")))
    assert lines["METRICS"] == "ok 5000"
    found = json.loads(lines["SUMMARY"])
    assert found["requested"] is None and found["delivered"] > 500
    assert (found["counted"], found["late_dropped"]) == (found["delivered"], 0)
    assert f"Total: {5000 + found['delivered']}" in command("topics", "count", "ratings", *state).stdout


def test_another_configuration_on_the_same_state_is_refused(state_dir: Path) -> None:
    flags = ("--no-ui", "--api-port", "0", "--state-dir", state_dir, "--ratings", "10")
    done = command("run", "--seed", "43", *flags, timeout_s=200)
    assert done.returncode == 2 and "another configuration" in done.stderr and "reset" in done.stderr, done.stderr
    done = command("run", "--tumbling", "30", *flags, timeout_s=200)
    assert done.returncode == 2 and "tumbling_s was 60, is 30" in done.stderr, done.stderr
    other = ("--checkpoint", hadoop_uri(state_dir / "other"))
    done = command("run", "--partitions", "5", *other, *flags, timeout_s=200)
    assert done.returncode == 2 and "has 4 partitions, the settings say 5" in done.stderr, done.stderr
    findings = json.loads(command("doctor", "--json", "--tumbling", "30", "--state-dir", state_dir).stdout)
    assert {f["check"]: f["level"] for f in findings}["checkpoint"] == "problem"


def test_reset_clears_the_state_and_nothing_else(state_dir: Path) -> None:
    (state_dir / "mine.txt").write_text("not the pipeline's")
    assert (state_dir / "checkpoint").is_dir() and list(state_dir.parent.iterdir()) == [state_dir]
    asked = command("reset", "--state-dir", state_dir)
    assert asked.returncode == 1 and (state_dir / "broker").exists()  # no answer is no
    assert command("reset", "--yes", "--state-dir", state_dir).returncode == 0
    assert not (state_dir / "broker").exists() and not (state_dir / "checkpoint").exists()
    assert (state_dir / "mine.txt").exists()
    done = command("topics", "count", "ratings", "--state-dir", state_dir)
    assert done.returncode == 2 and "nothing has run" in done.stderr


GENERATE_EACH = """
import json, ray, sys
from pathlib import Path
from ray_pipeline import Pipeline
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
for number, way in enumerate(json.loads(sys.argv[2])):
    topics = {f"{kind}_topic": f"actors-{number}.{kind}" for kind in ("ratings", "progress", "control")}
    with Pipeline(stages=("generate",), bootstrap_servers=sys.argv[1], ratings=20_000, rate=20_000,
                  start_time_ms=1_700_000_000_000, state_dir=Path(sys.argv[3]) / str(number), **topics, **way) as pipeline:
        assert pipeline.wait()
        print(pipeline.stop().delivered, flush=True)
"""


def test_the_same_bytes_from_1_2_and_4_actors_however_they_are_delivered(broker: str, tmp_path: Path) -> None:
    ways = [{"actors": 1}, {"actors": 2, "fast": True}, {"actors": 4, "delivery": "at-least-once"}]
    done = python("-c", GENERATE_EACH, broker, json.dumps(ways), tmp_path, timeout_s=300)
    assert done.stdout.split() == ["20000"] * len(ways)
    contents = []
    for number in range(len(ways)):
        partitions: dict[int, list[tuple[str | None, bytes | None]]] = defaultdict(list)
        for record in read_topic(broker, f"actors-{number}.ratings"):
            partitions[record.partition].append((record.key, record.value))
        contents.append(dict(partitions))
        assert count_records(broker, f"actors-{number}.ratings").total == 20_000
    assert sorted(contents[0]) == [0, 1, 2, 3]
    assert all(content == contents[0] for content in contents)
    # and the same from no actor at all, in one order over all partitions
    flags = ("--ratings", "20000", "--rate", "20000", "--start-time", "1700000000000", "--state-dir", tmp_path / "s")
    done = command("run", "--sink", "stdout", *flags, "--summary-json", tmp_path / "summary.json")
    assert done.returncode == 0 and json.loads((tmp_path / "summary.json").read_text())["delivered"] == 20_000
    by_value = {value: p for p, records in contents[0].items() for _, value in records}
    piped: dict[int, list[bytes | None]] = defaultdict(list)
    for line in done.stdout.encode().splitlines():
        piped[by_value[line]].append(line)
    assert piped == {p: [value for _, value in records] for p, records in contents[0].items()}


def test_a_reader_that_has_enough_ends_a_stream_without_end(tmp_path: Path) -> None:
    program = f"{Path(sys.executable).parent}/ray-pipeline run --sink stdout --rate 200 --state-dir {tmp_path}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{program} | head -n 5"],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(),
        check=False,
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 5, done.stderr
    assert "delivered" in done.stderr and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_four_terminals_and_one_state_directory_make_one_pipeline(
    starter: Callable[..., Running], tmp_path: Path
) -> None:
    state, flags = ("--state-dir", tmp_path), ("--tumbling", "5", "--sliding", "10", "--slide", "5")
    kafka = starter("broker", state_dir=tmp_path)
    bootstrap = str(kafka.info()["bootstrap"])
    done = command("generate", *("--rate", "500", "--ratings", "3000", "--partitions", "6", "--actors", "1"), *state)
    assert done.returncode == 0, done.stdout + done.stderr
    # the generator has ended, the broker has not; and whoever follows has the six partitions
    assert "Total: 3000" in command("topics", "count", "ratings", *state).stdout
    process = starter("process", "--console", *flags, state_dir=tmp_path)
    serve = starter("serve", "--no-ui", "--api-port", "0", *flags, state_dir=tmp_path)
    wait_for("the URL", lambda: "api: http://" in serve.text)
    job = wait_for(
        "all counted",
        lambda: (j := read_compacted(bootstrap, "metrics.progress").get("job")) and j["counted"] == 3000 and j,
        150,
    )
    assert job["late_dropped"] == 0
    wait_for("windows on the console", lambda: "window_start" in process.text and "tumbling_5s" in process.text)
    for used_by in (f"process {kafka.process.pid} (broker)", f"process {process.process.pid} (process)"):
        done = command("reset", "--yes", *state)
        assert done.returncode == 3 and used_by in done.stderr
    # nor does another state directory help: the Spark job reports on these topics
    elsewhere = command("reset", "--yes", "--bootstrap-servers", bootstrap, "--state-dir", tmp_path / "elsewhere")
    assert elsewhere.returncode == 3 and str(job["application"]) in elsewhere.stderr
    assert process.end() == 0 and serve.end() == 0 and kafka.end() == 0
