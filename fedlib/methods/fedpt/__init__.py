"""FedPT, which trains a part of a network, in private if asked: what serves this method alone comes in."""
