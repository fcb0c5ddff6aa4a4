"""Looks at everything that must be right before a start, and says what to do about what is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from xml.etree import ElementTree

import psutil

from ray_pipeline.cluster.head import named_cluster, require_head
from ray_pipeline.cluster.token import present_token
from ray_pipeline.config import Settings
from ray_pipeline.errors import ConfigurationError, EnvironmentProblem, RayPipelineError, StateMismatchError
from ray_pipeline.kafka.client import RIGHTS, check_broker
from ray_pipeline.kafka.rights import missing_rights
from ray_pipeline.kafka.topics import partitions_of, topic_specs
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.ports import why_not_free
from ray_pipeline.state import active_run, active_runs, brokers_of, require_writable
from spark_compat.classes import broker_classes, spark_classes
from spark_compat.errors import SparkCompatError
from spark_compat.jars import kafka_broker_jars, spark_connector_jars
from spark_compat.jvm import export_java, find_java
from spark_compat.paths import local_path
from spark_compat.versions import SCALA, check_versions

__all__ = ["Finding", "examine", "require"]

_LEAST_DISK_BYTES = 1 << 30
_NO_DISK_BYTES = 128 << 20
_LEAST_MEMORY_BYTES = 3 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination.

    Attributes:
        check: what was looked at.
        level: ``ok``, ``warning`` or ``problem``.
        detail: what was found.
        fix: what to do; empty when ok.
    """

    check: str
    level: str
    detail: str
    fix: str = ""


def require(settings: Settings, stages: tuple[str, ...]) -> None:
    """The fatal part, for a start.

    Raises:
        RayPipelineError: the first thing that makes a start impossible.
    """
    if "process" in stages or settings.bootstrap_servers is None:
        export_java_or_fail()
    if settings.bootstrap_servers is None or ("process" in stages and settings.checkpoint is None):
        _or_fail(_disk(settings), EnvironmentProblem)  # it takes what broker and job write
    if "process" in stages:
        _versions_or_fail()
        _or_fail(_checkpoint(settings), StateMismatchError)
        _or_fail(_scheduler(settings), ConfigurationError)
    if {"generate", "serve", "verify"} & set(stages):
        load_catalogue(settings)
    if "serve" in stages:
        _or_fail(_ports(settings), EnvironmentProblem)
    if (address := named_cluster(settings.ray_address)) and stages != ("serve",):  # which runs in this process
        require_head(address)
    if brokers := settings.brokers:
        check_broker(brokers)
    else:
        _or_fail(_embedded(settings), ConfigurationError)


def export_java_or_fail() -> str:
    """Find Java and put it where the other processes look; returns what was found."""
    try:
        java = find_java()
    except SparkCompatError as error:
        raise EnvironmentProblem(problem=error.problem, fix=error.fix) from None
    export_java(java)
    return f"version {java.version} in {java.home}"


def examine(settings: Settings) -> list[Finding]:
    """Look at everything; nothing is started or changed, apart from archives that are fetched."""
    checks: tuple[tuple[str, Callable[[Settings], Iterable[Finding]]], ...] = (
        ("java", lambda _: [Finding("java", "ok", export_java_or_fail())]),
        ("versions", lambda _: [Finding("versions", "ok", _versions_or_fail())]),
        ("jars", lambda _: [Finding("jars", "ok", _jars())]),
        ("classes", lambda _: [_classes()]),
        ("state directory", _state_directory),
        ("disk", _disk),
        ("memory", _memory),
        ("cpus", _cpus),
        ("ports", _ports),
        ("scheduler", _scheduler),
        ("catalogue", _catalogue),
        ("broker", _broker),
        ("checkpoint", _checkpoint),
    )
    found: list[Finding] = []
    for name, look in checks:
        try:
            found.extend(look(settings))
        except RayPipelineError as error:
            found.append(Finding(name, "problem", error.problem, error.fix))
        except SparkCompatError as error:
            found.append(Finding(name, "problem", error.problem, error.fix))
    return found


# -- what is looked at


def _or_fail(findings: Iterable[Finding], kind: type[RayPipelineError]) -> None:
    problem = next((f for f in findings if f.level == "problem"), None)
    if problem is not None:
        raise kind(problem.detail, problem.fix)


def _versions_or_fail() -> str:
    problems = check_versions()
    if problems:
        first = problems[0]
        raise EnvironmentProblem(
            problem=f"{first.package} is {first.installed or 'missing'}, {first.wanted} belongs to the others",
            fix="Install with: pip install -c constraints.txt -e .",
        )
    return f"pyspark, RayDP and Ray belong together; Kafka connector for Scala {SCALA}"


def _jars() -> str:
    return f"{len(kafka_broker_jars())} of the broker, {len(spark_connector_jars())} of Spark's Kafka source"


def _classes() -> Finding:
    java = find_java()
    missing = [classes.name for classes in (broker_classes(java), spark_classes(java)) if not classes.is_made()]
    if missing:
        return Finding(
            "classes",
            "warning",
            f"not archived for this Java and these jars: {', '.join(missing)}; starts take some 7 s more",
            "Make them, once: python -m spark_compat",
        )
    return Finding("classes", "ok", "what the JVMs load is archived")


def _state_directory(settings: Settings) -> Iterable[Finding]:
    require_writable(settings.state_dir)
    runs = active_runs(settings.state_dir)
    if not runs:
        yield Finding("state directory", "ok", str(settings.state_dir))
    for run in runs:
        yield Finding(
            "state directory",
            "warning",
            f"process {run.pid} runs {', '.join(run.stages)} in {settings.state_dir}",
            "Stop it before another run, or name another --state-dir",
        )


def _disk(settings: Settings) -> Iterable[Finding]:
    # it need not be there yet: its disk is that of what it will be in
    folder = settings.state_dir.absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise EnvironmentProblem(
            f"the disk of the state directory {settings.state_dir} cannot be looked at ({error.strerror})",
            "Name another with --state-dir",
        ) from None
    level = "problem" if free < _NO_DISK_BYTES else "warning" if free < _LEAST_DISK_BYTES else "ok"
    yield Finding(
        "disk",
        level,
        f"{free / 2**30:.1f} GiB free in {settings.state_dir}",
        "" if level == "ok" else "Free some space, or name another --state-dir: broker and job end when it is full",
    )
    shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    if shared < 1 << 28:
        yield Finding(
            "disk",
            "warning",
            f"/dev/shm has {shared / 2**20:.0f} MiB free",
            "Ray is slow without: docker run --shm-size=2g",
        )


def _memory(_: Settings) -> Iterable[Finding]:
    free = psutil.virtual_memory().available
    few = free < _LEAST_MEMORY_BYTES
    yield Finding(
        "memory",
        "warning" if few else "ok",
        f"{free / 2**30:.1f} GiB available, the whole pipeline takes about 3.5 GiB",
        "Lower executors or executor_memory" if few else "",
    )


def _cpus(settings: Settings) -> Iterable[Finding]:
    address = named_cluster(settings.ray_address)
    if address:
        present_token()
    from ray_pipeline.cluster.runtime import RayRuntime, cpu_budget, usable_cores

    budget, cores = cpu_budget(settings), usable_cores()
    if address:
        from ray_pipeline.cluster.directory import joined_cluster

        with joined_cluster(address):
            RayRuntime(settings).check_capacity()
        yield Finding("cpus", "ok", f"the Ray cluster at {address} has free what is needed: {budget}")
    elif budget.total > 2 * cores + 2:
        yield Finding(
            "cpus",
            "warning",
            f"needed: {budget}; this machine has {cores} cores, they would be shared",
            "Lower actors, executors or executor_cores",
        )
    else:
        yield Finding("cpus", "ok", f"needed: {budget}; this machine has {cores} cores")


def _ports(settings: Settings) -> Iterable[Finding]:
    wanted = [("api", settings.api_host, settings.api_port)]
    if settings.ui:
        wanted.append(("ui", settings.ui_host, settings.ui_port))
        if settings.ui_port == settings.api_port != 0:
            yield Finding(
                "ports",
                "problem",
                f"port {settings.api_port} is given to both API and dashboard",
                "Choose another with --ui-port, or 0",
            )
    for name, host, port in wanted:
        yield _port(name, host, port)


def _port(name: str, host: str, port: int) -> Finding:
    if port == 0:
        return Finding("ports", "ok", f"{name}: any free one")
    if (reason := why_not_free(host, port)) is not None:
        return Finding(
            "ports",
            "problem",
            f"port {port} on {host} cannot be used ({reason})",
            f"Choose another with --{name}-port, or 0",
        )
    return Finding("ports", "ok", f"{name}: {port} is free")


def _scheduler(settings: Settings) -> Iterable[Finding]:
    file = settings.fair_scheduler_file
    if file is None:
        yield Finding("scheduler", "ok", "pools of the shipped fairscheduler.xml")
        return
    try:
        pools = [str(pool.get("name")) for pool in ElementTree.parse(file).iter("pool")]
    except (OSError, ElementTree.ParseError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        yield Finding(
            "scheduler",
            "problem",
            f"fair_scheduler_file={file} cannot be read ({reason})",
            "Correct --fair-scheduler-file, or leave it out for the shipped one",
        )
    else:
        yield Finding("scheduler", "ok", f"{file}: pools {', '.join(pools)}")


def _catalogue(settings: Settings) -> Iterable[Finding]:
    catalogue = load_catalogue(settings)
    if settings.model is None:
        yield Finding("catalogue", "ok", f"{len(catalogue):,} movies")
        return
    world = f"{settings.users:,} users and {len(catalogue):,} movies, {settings.rank} factors"
    yield Finding("model", "ok", f"{settings.model}: {world} ({catalogue.digest})")


def _embedded(settings: Settings) -> Iterable[Finding]:
    if settings.security_protocol == "PLAINTEXT":
        yield Finding("broker", "ok", "an embedded one is started")
        return
    yield Finding(
        "broker",
        "problem",
        f"security_protocol={settings.security_protocol} is for brokers that are named, and none is: the embedded one speaks in clear",
        "Give --bootstrap-servers, or leave --security-protocol out",
    )


def _broker(settings: Settings) -> Iterable[Finding]:
    run = active_run(settings.state_dir)
    bootstrap = settings.brokers or (brokers_of(run, settings) if run else None)
    if bootstrap is None:
        yield from _embedded(settings)
        yield _port("broker", "127.0.0.1", settings.broker_port)
        return
    check_broker(bootstrap, starting=settings.bootstrap_servers is None)
    there = partitions_of(bootstrap, [settings.ratings_topic]).get(settings.ratings_topic)
    if there is None:
        yield Finding("broker", "ok", f"{bootstrap} answers; topic {settings.ratings_topic} will be made")
    elif there != settings.partitions:
        yield Finding(
            "broker",
            "problem",
            f"topic {settings.ratings_topic} has {there} partitions, the settings say {settings.partitions}",
            f"Give --partitions {there}, another topic, or clear it with: ray-pipeline reset",
        )
    else:
        yield Finding("broker", "ok", f"{bootstrap} answers; topic {settings.ratings_topic} has {there} partitions")
    if settings.brokers is not None:  # an embedded one asks nobody who it is
        yield from _rights(settings, settings.brokers)


def _rights(settings: Settings, bootstrap: str) -> Iterable[Finding]:
    there, lacking = missing_rights(bootstrap, [spec.name for spec in topic_specs(settings)])
    if lacking:
        yield Finding("rights", "problem", f"not allowed: {'; '.join(lacking)}", RIGHTS)
    else:
        yield Finding("rights", "ok", f"all that is needed on the {len(there)} topics that are there")


def _checkpoint(settings: Settings) -> Iterable[Finding]:
    from ray_pipeline.windows.marker import marker_of, mismatch, way_to_clear

    uri = settings.checkpoint_uri
    path = local_path(uri)
    if path is None:
        yield Finding("checkpoint", "ok", f"{uri}; compared when Spark is up")
        return
    text = marker_of(path)
    different = None if text is None else mismatch(settings, text)
    if text is None:
        yield Finding("checkpoint", "ok", f"{uri} is new: reading begins at the earliest record")
    elif different is None:
        yield Finding("checkpoint", "ok", f"{uri} belongs to these settings: reading goes on where it ended")
    else:
        yield Finding(
            "checkpoint",
            "problem",
            f"{uri} is of another configuration: {different}",
            f"Give the former value, another --checkpoint, or {way_to_clear(settings)}",
        )
