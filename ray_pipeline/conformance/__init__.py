"""The stream proves its settings: what was emitted, judged against every declared knob. Pure."""
