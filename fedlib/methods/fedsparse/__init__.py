"""FedSparse and FedPM, where a mask over fixed random weights is trained: what only their messages and training need
may come in.
"""
