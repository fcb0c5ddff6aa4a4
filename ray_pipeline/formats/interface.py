"""What a format is: values as they are written, and back to the contract's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ray_pipeline.codec import encode_values
from ray_pipeline.events import EventBatch

__all__ = ["CONTRACT", "ContractJson", "WireFormat"]


class WireFormat(Protocol):
    """Turns ratings into values of records and back.

    Everything behind it, audit and shards alike, sees values in the contract's form alone.
    """

    def to_wire(self, batch: EventBatch) -> Sequence[bytes | None]:
        """The value of each rating, as it is written; None = no value."""
        ...

    def from_wire(self, values: list[bytes | None]) -> list[bytes | None]:
        """The same values in the contract's form.

        One that :meth:`to_wire` does not write, byte for byte, is left as it is; where it would pass for one that it writes, with a
        space behind it.
        """
        ...


class ContractJson:
    """See :class:`WireFormat`: the contract's own form, as it is."""

    def to_wire(self, batch: EventBatch) -> Sequence[bytes | None]:
        """See :func:`~ray_pipeline.codec.encode_values`."""
        return encode_values(batch)

    def from_wire(self, values: list[bytes | None]) -> list[bytes | None]:
        """The values themselves."""
        return values


CONTRACT = ContractJson()
"""The contract's own form; it has no state."""
