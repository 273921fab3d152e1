"""FedDQ, which quantizes updates with fewer bits as training goes on: what serves this method alone comes in."""
