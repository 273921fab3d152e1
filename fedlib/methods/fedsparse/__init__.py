"""FedSparse and FedPM, which train a mask over fixed random weights: what serves this method alone comes in."""
