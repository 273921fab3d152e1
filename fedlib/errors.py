"""The errors that a user can cause and mend. Each message names the field, the value and the remedy."""


class FedlibError(Exception):
    """Base class: the command line prints its message without a traceback and exits with status 2."""


class SpecError(FedlibError, ValueError):
    """A run's description is wrong: unknown name, unknown key, value out of range."""


class DataError(FedlibError):
    """A data file is missing, or its bytes are not the expected ones."""


class PayloadError(FedlibError, ValueError):
    """A message cannot be read: truncated, altered, foreign, not finite, or larger than its model allows."""


class RunError(FedlibError, RuntimeError):
    """A run cannot go on: no usable update, a worker died, no such device."""
