"""Objects in Ray's store for actors that may be started anew at any time."""

from __future__ import annotations

from typing import Any

import ray as _untyped_ray

ray: Any = _untyped_ray  # much of it has no types

__all__ = ["Kept"]


class Kept:
    """An object that stays in Ray's store as long as the process that put it there lives; an argument for actors.

    A reference among an actor's arguments may lead nowhere when Ray starts the actor anew, and Ray says so on the terminal
    (its issue 53727). One that was written down keeps the object.

    Args:
        reference: to the object.
    """

    def __init__(self, reference: Any) -> None:
        self._written: bytes = ray.cloudpickle.dumps(reference)

    @classmethod
    def put(cls, value: Any) -> Kept:
        """Put an object into the store."""
        return cls(ray.put(value))

    def get(self) -> Any:
        """The object: one copy a node, read in place. Blocks until it is there."""
        return ray.get(ray.cloudpickle.loads(self._written))
