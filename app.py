"""Compose and run: the pipeline in a few lines of Python.

``python app.py`` runs until Ctrl-C; settings come from ``RAY_PIPELINE_…`` in the environment.
"""

from __future__ import annotations

import signal
import threading

from ray_pipeline import Pipeline, load_settings


def main() -> None:
    """Run the pipeline until it is told to stop, then say what it did."""
    stop = threading.Event()
    with Pipeline(load_settings(), on_event=print) as pipeline:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(*pipeline.urls.values())
        pipeline.wait(stop)
        print(pipeline.stop().as_dict())


if __name__ == "__main__":
    main()
