"""A Spark session: on Ray through RayDP, or on this machine alone."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from spark_compat.classes import spark_classes
from spark_compat.conf import JAVA_OPTIONS
from spark_compat.errors import SparkCompatError
from spark_compat.jvm import Java, export_java, find_java, path_option

__all__ = ["SparkSessionOwner"]

_log = logging.getLogger(__name__)

_CONNECT_S = 1.0


class SparkSessionOwner:
    """Starts one session, and ends it.

    RayDP puts the Spark driver into the process that asks for the session, so this belongs in an actor of its own.

    Args:
        app_name: name of the application; two of one name on a Ray cluster clash.
        conf: Spark settings.
        executors: number of executors.
        executor_cores: cores of each.
        executor_memory: memory of each, such as ``1g``.
        master: such as ``local[2]``: plain Spark, no Ray; None = on Ray.
        temporary: where the JVMs on Ray, which are killed in the end and remove nothing, have their temporary files: a folder that all
            nodes have; None = where Java has them by itself.
    """

    def __init__(
        self,
        app_name: str,
        conf: dict[str, str],
        executors: int,
        executor_cores: int,
        executor_memory: str,
        master: str | None = None,
        temporary: Path | None = None,
    ) -> None:
        self._app_name = app_name
        self._conf = dict(conf)
        self._executors = executors
        self._executor_cores = executor_cores
        self._executor_memory = executor_memory
        self._master = master
        self._temporary = temporary
        self._session: Any = None

    @property
    def session(self) -> Any:
        """The session; exists from :meth:`start` on."""
        if self._session is None:
            msg = "the Spark session was not started"
            raise RuntimeError(msg)
        return self._session

    def start(self) -> Any:
        """Start the session.

        Raises:
            SparkCompatError: Java is missing, or the Ray cluster has too few CPUs.
        """
        java = find_java()
        export_java(java)
        # what executors run Python functions with
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        if self._master is None:
            self._session = self._on_ray(java)
        else:
            self._session = self._alone()
        return self._session

    def executors_alive(self) -> int:
        """How many executors are registered, the driver not counted."""
        infos = self.session.sparkContext._jsc.sc().statusTracker().getExecutorInfos()
        return len(infos) - (1 if self._master is None else 0)

    def master_is_gone(self) -> bool:
        """Whether nobody listens any more where RayDP's master, which hands out executors, must be."""
        if self._session is None or self._master is not None:
            return False
        place = urlsplit(self.session.sparkContext.master)
        if place.hostname is None or place.port is None:
            return False
        try:
            socket.create_connection((place.hostname, place.port), _CONNECT_S).close()
        except ConnectionRefusedError:
            return True
        except OSError as error:  # it may be slow, or its node far away: that is for others to judge
            _log.debug("RayDP's master: %s", error)
        return False

    def jvm_ended(self) -> bool:
        """Whether the driver's JVM, a child of this process, has ended, or the session has."""
        if self._session is None:
            return True
        process = getattr(self.session.sparkContext._gateway, "proc", None)
        return process is not None and process.poll() is not None

    def stop(self) -> None:
        """End the session, and its executors."""
        if self._session is None:
            return
        self._session = None
        if self._master is None:
            import raydp

            raydp.stop_spark()
        else:
            from pyspark.sql import SparkSession

            active = SparkSession.getActiveSession()
            if active is not None:
                active.stop()

    def _on_ray(self, java: Java) -> Any:
        import ray
        import raydp

        needed = self._executors * self._executor_cores
        free = ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        if free < needed:  # RayDP would wait for them for ever, and say nothing
            raise SparkCompatError(
                f"the Ray cluster has {free:g} CPUs free, {self._executors} executors of {self._executor_cores} cores "
                f"need {needed}",
                "Lower executors or executor_cores, add nodes, or stop other jobs",
            )
        added = spark_classes(java).options()
        if self._temporary is not None:
            added += path_option("-Djava.io.tmpdir", self._temporary)
        options = " ".join(added)
        conf = self._conf | {key: f"{self._conf.get(key, '')} {options}".strip() for key in JAVA_OPTIONS}
        return raydp.init_spark(
            self._app_name,
            self._executors,
            self._executor_cores,
            self._executor_memory,
            fault_tolerant_mode=False,  # it is about Ray datasets, which are not used here
            configs=conf,
        )

    def _alone(self) -> Any:
        from pyspark.sql import SparkSession

        builder: Any = SparkSession.builder
        return builder.appName(self._app_name).master(self._master).config(map=self._conf).getOrCreate()
