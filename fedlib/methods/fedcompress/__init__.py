"""FedCompress, which clusters weights and distils: what clusters, codes, augments or distils for it may come in."""
