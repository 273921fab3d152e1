"""Networks and their initial values: what describes, freezes or costs a network comes in, not what trains it."""
