"""From an experiment file to a record: what describes, repeats or stores a run comes in, not what reads results."""
