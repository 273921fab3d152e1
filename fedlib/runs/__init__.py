"""From an experiment file to a record: what describes, repeats, checks or stores a run may come in, but nothing that
reads off results.
"""
