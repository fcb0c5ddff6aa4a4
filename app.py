"""Compose and run: the pipeline in a few lines of Python.

``python app.py`` runs until Ctrl-C; settings come from ``RAY_PIPELINE_…`` in the environment.
"""

from __future__ import annotations

from ray_pipeline import Pipeline, load_settings
from ray_pipeline.command.running import StopSignal


def main() -> None:
    """Run the pipeline until it is told to stop, then say what it did."""
    stop = StopSignal()
    stop.install()
    try:
        with Pipeline(load_settings(), on_event=print) as pipeline:
            stop.started()
            print(*pipeline.urls.values())
            pipeline.wait(stop.event)
            print(pipeline.stop().as_dict())
    except KeyboardInterrupt:
        print("stopped while starting")


if __name__ == "__main__":
    main()
