"""What travels between server and clients: a method may come in that knows tasks and messages, but no engine and no
run.
"""
