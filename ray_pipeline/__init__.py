"""Trustworthy streams of synthetic ratings: Ray actors to Kafka, windowed by Spark on Ray, reproducible to the record.

Importing this loads neither Ray nor Spark; :class:`Pipeline` does when it is asked for.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_pipeline.config import Settings, load_settings
    from ray_pipeline.errors import RayPipelineError
    from ray_pipeline.pipeline import Pipeline, Summary

__all__ = ["Pipeline", "RayPipelineError", "Settings", "Summary", "__version__", "load_settings"]

__version__ = version("ray-pipeline")

_HOMES = {
    "Pipeline": "pipeline",
    "RayPipelineError": "errors",
    "Settings": "config",
    "Summary": "pipeline",
    "load_settings": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
