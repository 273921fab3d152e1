"""A network and data of one's own: runs, what comes of them, messages alone."""
