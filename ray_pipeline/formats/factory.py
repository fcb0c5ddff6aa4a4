"""The format that the settings name."""

from __future__ import annotations

from ray_pipeline.config import Settings
from ray_pipeline.errors import ConfigurationError
from ray_pipeline.formats.fields import Layout
from ray_pipeline.formats.interface import WireFormat
from ray_pipeline.formats.mapped import MappedFormat, json_format

__all__ = ["open_format"]


def open_format(settings: Settings) -> WireFormat:
    """The format; asks the registry, where there is one, when it is first used.

    Raises:
        ConfigurationError: the run's format needs a registry, and none is named.
    """
    if settings.format == "json":
        return json_format(settings)
    if settings.schema_registry_url is None:
        raise ConfigurationError(
            problem=f"the ratings are written in format {settings.format}, and no schema registry is named",
            fix="Give --schema-registry-url",
        )
    from ray_pipeline.formats.registry import registry_serde

    layout = Layout.of(settings)
    serde = registry_serde(settings.format, layout, settings.ratings_topic, settings.schema_registry_url)
    return MappedFormat(layout, serde)
