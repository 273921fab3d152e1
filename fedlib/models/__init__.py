"""Networks, their initial values, freezing, and the products they cost: what describes a network may come in, not
how it is trained.
"""
