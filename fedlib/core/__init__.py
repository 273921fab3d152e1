"""What the server and every client agree on, whatever the method: it may come in if two methods or an engine need
it.
"""
