"""Five ways to save bytes in federated learning, small enough to read: start at `fedlib.runs.rounds`, the federated
loop.
"""
