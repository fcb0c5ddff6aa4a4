"""A real Kafka broker as a child process: KRaft, one node, everything under one folder."""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import psutil
from confluent_kafka import KafkaException

from ray_pipeline.errors import EnvironmentProblem
from ray_pipeline.kafka.client import make_admin
from ray_pipeline.ports import any_free_port, is_free
from spark_compat.classes import broker_classes
from spark_compat.errors import SparkCompatError
from spark_compat.jars import kafka_broker_jars
from spark_compat.jvm import find_java

__all__ = ["FREE_SPACE", "EmbeddedBroker"]

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_LEAST_DISK_BYTES = 16 << 20
"""With less the broker cannot even begin a segment with its indexes."""
_NO_SPACE = "No space left on device"
_PREDECESSOR_S = 30.0
"""How long a broker whose run was killed may take to end: the kernel tells it to, and it ends in order."""
_MOST_LOG_BYTES = 4 << 20
FREE_SPACE = "Free some space and start again: it goes on where it was, nothing is lost or repeated"

_PROPERTIES = """\
process.roles=broker,controller
node.id=1
listeners=BROKER://{host}:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=BROKER://{host}:{advertised_port}
inter.broker.listener.name=BROKER
controller.listener.names=CONTROLLER
controller.quorum.bootstrap.servers=127.0.0.1:{controller_port}
listener.security.protocol.map=BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={data}
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
# the first look comes so long after the start: a broker that gives a transaction up before it is let in itself never gets the marker
# written, and readers wait for ever
transaction.abort.timed.out.transaction.cleanup.interval.ms=5000
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
log.retention.ms=-1
log.cleaner.dedupe.buffer.size=16777216
log.cleaner.backoff.ms=5000
num.network.threads=2
num.io.threads=4
controlled.shutdown.enable=false
# a broker that was killed is let in again when the session of the one before is over: 13 s with Kafka's defaults, 5 s so
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
"""


class EmbeddedBroker:
    """Kafka for one machine. The data stays in its folder; starting it there again goes on with it, on the same port.

    Args:
        state_dir: everything is kept in ``broker`` and ``logs`` below it.
        port: 0 = the port of the last time, else any free one.
        host: address to listen on and to advertise.
        heap_mib: heap of the JVM, MiB.
        advertised_port: port that clients are told, where something stands before the broker; 0 = its own.
    """

    _quorum: Sequence[str] = ("--standalone",)
    """How its folder is formatted: as the only controller."""

    def __init__(
        self,
        state_dir: Path,
        port: int = 0,
        host: str = "127.0.0.1",
        heap_mib: int = 512,
        advertised_port: int = 0,
    ) -> None:
        self._folder = state_dir.absolute() / "broker"
        self._log_file = state_dir.absolute() / "logs" / "broker.log"
        self._wanted_port = port
        self._host = host
        self._heap_mib = heap_mib
        self._advertised_port = advertised_port
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None
        self._log_start = 0

    @property
    def bootstrap_servers(self) -> str:
        """HOST:PORT for clients; known from :meth:`start` on."""
        return f"{self._host}:{self._port}"

    @property
    def pid(self) -> int | None:
        """Process id of the running JVM, None when it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def log_file(self) -> Path:
        """What the broker says."""
        return self._log_file

    def full_disk(self) -> str:
        """What to say when the broker ended because its disk is full; empty when it is not."""
        free = shutil.disk_usage(self._folder).free
        if free >= _LEAST_DISK_BYTES and _NO_SPACE not in self._said_since_start():
            return ""
        return f"the disk of the broker's data is full ({free / 2**20:.0f} MiB free in {self._folder})"

    def start(self, deadline_s: float = 60.0) -> None:
        """Start and wait until it answers.

        Raises:
            EnvironmentProblem: Java or the jars are missing, the folder cannot be written or is in use, the broker of a run that
                was killed does not end, the port is taken, the disk is full, or the JVM ended; the text has the end of its log.
        """
        if self.pid is not None:
            return
        try:
            java = find_java()
            classpath = os.pathsep.join(str(jar) for jar in kafka_broker_jars())
        except SparkCompatError as error:
            raise EnvironmentProblem(problem=error.problem, fix=error.fix) from error
        self._take_folder()
        try:
            self._choose_port()
            properties = self._write_properties()
            command = [str(java.executable), *broker_classes(java).options()]
            command += [f"-Xmx{self._heap_mib}m", "-Xms128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
            command += [f"-Dorg.slf4j.simpleLogger.defaultLogLevel={'warn'}", "-cp", classpath]
            if not (self._folder / "data" / "meta.properties").is_file():
                self._format(command, properties)
            self._launch([*command, "kafka.Kafka", str(properties)])
            self._wait_until_ready(deadline_s)
        except BaseException:
            self.kill()
            raise

    def stop(self, deadline_s: float = 30.0) -> None:
        """End it in order; after ``deadline_s`` seconds by force."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(deadline_s)
            except subprocess.TimeoutExpired:
                _log.warning("the broker did not end within %.0f s and is killed", deadline_s)
        self.kill()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._process = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- inside

    def _take_folder(self) -> None:
        if "," in str(self._folder):
            raise EnvironmentProblem(
                problem=f"the path of the state directory {self._folder.parent} has a comma, where Kafka ends one folder's name",
                fix="Name another with --state-dir",
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._log_file.parent.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / "lock").open("a+")
        except OSError as error:
            raise EnvironmentProblem(
                problem=f"the state directory cannot be written ({error})", fix="Name another with --state-dir"
            ) from error
        deadline = time.monotonic() + _PREDECESSOR_S
        while not _locked(self._lock):
            self._lock.seek(0)
            said = self._lock.read().split()
            if (ending := _orphan(said)) is not None and time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            self._lock.close()
            self._lock = None
            if ending is not None:
                raise EnvironmentProblem(
                    problem=f"the broker of a run in {self._folder.parent} that was killed does not end (process {ending})",
                    fix=f"End it: kill -9 {ending}",
                )
            raise EnvironmentProblem(
                problem=f"the broker of {self._folder.parent} is in use by process {said[0] if said else 'unknown'}",
                fix="Stop that pipeline, or name another --state-dir",
            )
        self._sign()

    def _sign(self, *also: int) -> None:
        """Write down who holds the folder: this process, and the JVM once there is one."""
        assert self._lock is not None
        self._lock.truncate(0)
        self._lock.write(" ".join(map(str, (os.getpid(), *also))))
        self._lock.flush()

    def _choose_port(self) -> None:
        remembered = self._folder / "port"
        port = self._wanted_port
        if port == 0:
            last = _port_in(remembered)
            port = last if last and is_free(self._host, last) else any_free_port(self._host)
        elif not is_free(self._host, port):
            raise EnvironmentProblem(
                problem=f"port {port} for the broker is in use", fix="Choose another with --broker-port, or 0"
            )
        self._port = port
        remembered.write_text(str(port))

    def _write_properties(self) -> Path:
        path = self._folder / "server.properties"
        path.write_text(
            _PROPERTIES.format(
                host=self._host,
                port=self._port,
                advertised_port=self._advertised_port or self._port,
                controller_port=any_free_port("127.0.0.1", besides=(self._port,)),
                data=_property(str(self._folder / "data")),
            )
        )
        return path

    def _format(self, command: list[str], properties: Path) -> None:
        cluster_id = "cmF5LXBpcGVsaW5lLWtmaw"  # 22 characters of base64, as Kafka wants
        tool = [*command, "kafka.tools.StorageTool", "format", *self._quorum, "-t", cluster_id, "-c", str(properties)]
        done = subprocess.run(tool, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode != 0:
            raise EnvironmentProblem(
                problem=f"the broker's folder could not be formatted: {(done.stderr or done.stdout).strip()[-500:]}",
                fix="Remove the state directory or name another",
            )

    def _launch(self, command: list[str]) -> None:
        assert self._lock is not None
        libc = ctypes.CDLL(None, use_errno=True)

        def die_with_parent() -> None:
            # a killed pipeline must not leave a broker behind; harmless where the kernel does not know it
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        with self._log_file.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for the pipeline, which stops the broker last
                preexec_fn=die_with_parent,
                pass_fds=(
                    self._lock.fileno(),
                ),  # it holds the folder for as long as it lives, whatever became of this process
                cwd=self._folder,
            )
        self._sign(self._process.pid)

    def _wait_until_ready(self, deadline_s: float) -> None:
        assert self._process is not None
        deadline = time.monotonic() + deadline_s
        while not _accepts(self._host, self._port):
            if self._process.poll() is not None:
                if full := self.full_disk():
                    raise EnvironmentProblem(problem=full, fix=FREE_SPACE)
                raise EnvironmentProblem(
                    problem=f"the broker ended with code {self._process.returncode}: {self._log_tail()}",
                    fix=f"See {self._log_file.name} in the state directory's logs",
                )
            if time.monotonic() > deadline:
                raise EnvironmentProblem(
                    problem=f"the broker was not ready within {deadline_s:.0f} s: {self._log_tail()}", fix=""
                )
            time.sleep(0.05)
        try:
            make_admin(self.bootstrap_servers).list_topics(timeout=max(1.0, deadline - time.monotonic()))
        except KafkaException as error:
            raise EnvironmentProblem(problem=f"the broker does not answer: {error}", fix="") from error

    def _said_since_start(self) -> str:
        try:
            with self._log_file.open("rb") as log:
                log.seek(self._log_start)
                return log.read(_MOST_LOG_BYTES).decode(errors="replace")
        except OSError:
            return ""  # it could not be written either

    def _log_tail(self) -> str:
        return self._log_file.read_text(errors="replace")[-600:].strip() or "its log is empty"


def _port_in(file: Path) -> int:
    """The port that a file holds; 0 when there is none, as where a disk was full when it was written."""
    try:
        port = int(file.read_text())
    except (OSError, ValueError):
        return 0
    return port if 0 < port < 65_536 else 0


def _property(text: str) -> str:
    """A value for a file of Java properties, which are read as Latin-1: what is escaped there is what JSON escapes, in the same way."""
    return json.dumps(text)[1:-1]


def _locked(file: IO[str]) -> bool:
    """Take the lock, unless somebody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _orphan(said: list[str]) -> int | None:
    """The broker that has outlived the process that started it; None when that process still has the folder.

    Args:
        said: the words of the lock's file: that process, and the broker once it runs.
    """
    if len(said) != 2:
        return None
    holder, broker = map(int, said)
    try:
        parent = psutil.Process(broker).ppid()
    except psutil.NoSuchProcess:  # it has ended, just now or to be started again by that process
        return None if psutil.pid_exists(holder) else broker
    return None if parent == holder else broker


def _accepts(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, port)) == 0
