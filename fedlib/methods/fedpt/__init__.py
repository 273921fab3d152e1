"""FedPT, which trains a part of the network and can add privacy: what trains a part, adds noise or counts epsilon
may come in.
"""
