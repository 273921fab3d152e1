"""One run, from its description to its record: what it is, its rounds, and when its record still counts."""
