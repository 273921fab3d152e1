"""FedCompress, which sends weights in clusters: what serves it, or another method with clusters, comes in."""
