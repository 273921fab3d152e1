"""Real clients by Flower: a server, a SuperLink of Flower between, and nodes that train their own clients or any."""
