"""Rate shapes: how many ratings are due up to a time, as a small language and as exact, random-access counts."""
