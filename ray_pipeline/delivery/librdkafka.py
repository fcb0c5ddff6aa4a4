"""librdkafka's batch call, on the handle that an ordinary ``confluent_kafka.Producer`` has, and a check that this is possible here.

The library that ``confluent_kafka`` was linked with is asked for its own symbols, so there is no second client and no second copy of
the library: settings, transactions, polling and errors stay with the producer. What is relied on beyond the public interface is
where the producer keeps its handle, and how a compiler laid out ``rd_kafka_message_t``. A mistake there ends the process, so
:func:`obstacle` proves both on scratch objects, without a broker, before anything is sent that way.
"""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import confluent_kafka
import numpy as np
import numpy.typing as npt
from confluent_kafka import Producer

__all__ = ["MESSAGE", "QUEUE_FULL", "TRIED", "Librdkafka", "obstacle"]

TRIED = frozenset({("2.16.1", "2.16.0")})
"""Versions of confluent-kafka and of its librdkafka with which the contract suite passed."""

MESSAGE = np.dtype(
    {
        "names": ["err", "topic", "partition", "payload", "len", "key", "key_len", "offset", "private"],
        "formats": ["i4", "u8", "i4", "u8", "u8", "u8", "u8", "i8", "u8"],
        "offsets": [0, 8, 16, 24, 32, 40, 48, 56, 64],
        "itemsize": 72,
    }
)
"""``rd_kafka_message_t`` on 64-bit systems: pointers and lengths are 8 bytes."""

QUEUE_FULL = -184
"""``RD_KAFKA_RESP_ERR__QUEUE_FULL``."""

_PRODUCER = 0
_COPY = 2
_PURGE_QUEUE = 1
_PURGED = -152
_EVENT_DELIVERY = 1
_PROBE_TIMEOUT_MS = 5_000

_POINTER, _INT, _SIZE, _TEXT = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "rd_kafka_version": (_INT, ()),
    "rd_kafka_name": (_TEXT, (_POINTER,)),
    "rd_kafka_type": (_INT, (_POINTER,)),
    "rd_kafka_opaque": (_POINTER, (_POINTER,)),
    "rd_kafka_topic_new": (_POINTER, (_POINTER, _TEXT, _POINTER)),
    "rd_kafka_topic_destroy": (None, (_POINTER,)),
    "rd_kafka_produce_batch": (_INT, (_POINTER, ctypes.c_int32, _INT, _POINTER, _INT)),
    # for the probe
    "rd_kafka_conf_new": (_POINTER, ()),
    "rd_kafka_conf_set": (_INT, (_POINTER, _TEXT, _TEXT, _TEXT, _SIZE)),
    "rd_kafka_conf_set_events": (None, (_POINTER, _INT)),
    "rd_kafka_new": (_POINTER, (_INT, _POINTER, _TEXT, _SIZE)),
    "rd_kafka_destroy": (None, (_POINTER,)),
    "rd_kafka_produce": (_INT, (_POINTER, ctypes.c_int32, _INT, _TEXT, _SIZE, _TEXT, _SIZE, _POINTER)),
    "rd_kafka_purge": (_INT, (_POINTER, _INT)),
    "rd_kafka_queue_get_main": (_POINTER, (_POINTER,)),
    "rd_kafka_queue_destroy": (None, (_POINTER,)),
    "rd_kafka_queue_poll": (_POINTER, (_POINTER, _INT)),
    "rd_kafka_event_type": (_INT, (_POINTER,)),
    "rd_kafka_event_message_next": (_POINTER, (_POINTER,)),
    "rd_kafka_event_destroy": (None, (_POINTER,)),
}


class Unusable(Exception):
    """The batch call cannot be used here; the text says why."""


class Librdkafka:
    """The functions of the library inside ``confluent_kafka``; each releases Python's lock while it runs.

    Raises:
        Unusable: a function is missing.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(confluent_kafka.cimpl.__file__)
        self._functions: dict[str, Any] = {}
        for name, (result, arguments) in _FUNCTIONS.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise Unusable(f"{name} is not among the functions of librdkafka") from None
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function

    def call(self, name: str, *arguments: Any) -> Any:
        """Call ``rd_kafka_<name>``."""
        return self._functions[f"rd_kafka_{name}"](*arguments)

    def handle_of(self, producer: Producer) -> int:
        """Address of the producer's ``rd_kafka_t``, good while the producer lives.

        Raises:
            Unusable: what was found is not this producer's handle.
        """
        handle = _first_field(producer)
        if not handle:
            raise Unusable("the producer has no handle")
        if self.call("opaque", handle) != id(producer) or self.call("type", handle) != _PRODUCER:
            raise Unusable("what was taken for the producer's handle belongs to another object")
        return handle

    def new_topic(self, handle: int, topic: str) -> int:
        """A topic of a producer, to be let go with :meth:`destroy_topic` before the producer goes."""
        found: int | None = self.call("topic_new", handle, topic.encode(), None)
        if not found:
            raise Unusable(f"topic {topic!r} was refused")
        return found

    def destroy_topic(self, topic: int) -> None:
        """Let go of a topic."""
        self.call("topic_destroy", topic)

    def produce_batch(self, topic: int, partition: int, messages: npt.NDArray[np.void]) -> int:
        """Queue messages for one partition; their keys and payloads are copied before this returns.

        Args:
            topic: from :meth:`new_topic`.
            partition: where to.
            messages: shape (n,), n ≥ 1, contiguous, of :data:`MESSAGE`; ``err`` is set for each, 0 = queued.

        Returns:
            How many were queued. From the first for which the queue was full, none was; any other error is one message's own.
        """
        return int(self.call("produce_batch", topic, partition, _COPY, messages.ctypes.data, len(messages)))


def _first_field(producer: Producer) -> int | None:
    """The pointer that follows the header every Python object has."""
    if type(producer).__basicsize__ < object.__basicsize__ + ctypes.sizeof(_POINTER):
        raise Unusable("a producer is too small to hold a handle")
    return _POINTER.from_address(id(producer) + object.__basicsize__).value


def obstacle() -> str | None:
    """Why the batch call cannot be used in this process; None when it can. Takes some milliseconds."""
    try:
        self_check()
    except Unusable as error:
        return str(error)
    return None


def self_check() -> None:
    """Prove on scratch objects all that the batch call relies on.

    Raises:
        Unusable: something is not as expected.
    """
    versions = (str(confluent_kafka.version()), str(confluent_kafka.libversion()[0]))
    if versions not in TRIED:
        raise Unusable(f"confluent-kafka {versions[0]} with librdkafka {versions[1]} was not tried")
    if ctypes.sizeof(_POINTER) != 8:
        raise Unusable("this is not a 64-bit system")
    library = Librdkafka()
    if library.call("version") != confluent_kafka.libversion()[1]:
        raise Unusable("the functions found belong to another librdkafka than confluent-kafka uses")
    _check_handle(library)
    _check_messages(library)


def _check_handle(library: Librdkafka) -> None:
    name = f"probe-{uuid.uuid4().hex}"
    producer = Producer({"client.id": name, "log_level": 0})
    found = library.call("name", library.handle_of(producer))
    if not (found or b"").startswith(name.encode()):
        raise Unusable(f"the handle's name is {found!r}, not that of the producer")


def _check_messages(library: Librdkafka) -> None:
    """A message that went in by value must come out with its fields in their places; only then are places used to put some in."""
    with _scratch(library) as (handle, topic, queue):
        library.call("produce", topic, 3, _COPY, b"payload", 7, b"key", 3, 0x1234)
        went_in = [(3, b"payload", b"key", 0x1234)]
        if _purged(library, handle, queue, went_in) != went_in:
            raise Unusable("the fields of a message are not where they were expected")
        payloads, keys = np.frombuffer(b"onetwo", np.uint8), np.frombuffer(b"k1key2", np.uint8)
        messages = np.zeros(2, MESSAGE)
        messages["payload"] = payloads.ctypes.data + np.array([0, 3])
        messages["len"] = 3
        messages["key"] = keys.ctypes.data + np.array([0, 2])
        messages["key_len"] = 2, 4
        messages["private"] = 0x55, 0x66
        went_in = [(4, b"one", b"k1", 0x55), (4, b"two", b"key2", 0x66)]
        queued = library.produce_batch(topic, 4, messages)
        if queued != len(went_in) or _purged(library, handle, queue, went_in) != went_in:
            raise Unusable("messages of a batch did not come out as they went in")


@contextmanager
def _scratch(library: Librdkafka) -> Iterator[tuple[int, int, int]]:
    """A producer without a broker, a topic of it, and the queue where it says what became of messages."""
    conf = library.call("conf_new")
    text = ctypes.create_string_buffer(512)
    library.call("conf_set", conf, b"log_level", b"0", text, 512)
    library.call("conf_set_events", conf, _EVENT_DELIVERY)
    handle = library.call("new", _PRODUCER, conf, text, 512)
    if not handle:
        raise Unusable(f"no scratch producer: {text.value.decode(errors='replace')}")
    topic, queue = library.new_topic(handle, "probe"), library.call("queue_get_main", handle)
    try:
        yield handle, topic, queue
    finally:
        library.call("queue_destroy", queue)
        library.call("topic_destroy", topic)
        library.call("destroy", handle)


def _purged(
    library: Librdkafka, handle: int, queue: int, wanted: list[tuple[int, bytes, bytes, int]]
) -> list[tuple[int, bytes, bytes, int]]:
    """Drop what is queued, and read the reports of it: partition, payload, key, private. Lengths are compared before any is read."""
    library.call("purge", handle, _PURGE_QUEUE)
    found: list[tuple[int, bytes, bytes, int]] = []
    while len(found) < len(wanted):
        event = library.call("queue_poll", queue, _PROBE_TIMEOUT_MS)
        if not event or library.call("event_type", event) != _EVENT_DELIVERY:
            raise Unusable("a scratch message was not reported")
        try:
            while address := library.call("event_message_next", event):
                message = np.frombuffer(ctypes.string_at(address, MESSAGE.itemsize), MESSAGE)[0]
                lengths = [(len(payload), len(key)) for _, payload, key, _ in wanted]
                if message["err"] != _PURGED or (message["len"], message["key_len"]) not in lengths:
                    raise Unusable("the fields of a message are not where they were expected")
                payload = ctypes.string_at(int(message["payload"]), int(message["len"]))
                key = ctypes.string_at(int(message["key"]), int(message["key_len"]))
                found.append((int(message["partition"]), payload, key, int(message["private"])))
        finally:
            library.call("event_destroy", event)
    return found
