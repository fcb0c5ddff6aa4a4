"""The fault storm: a seeded plan of faults against a running pipeline, and the proof of what it did to the stream."""
