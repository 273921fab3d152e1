"""Five ways to save bytes in federated learning, small enough to read. Start at `fedlib.rounds`."""

__version__ = "0.1.0"
