"""The stages as Ray actors, and the Ray they run on."""
