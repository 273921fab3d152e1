"""Numbers to bytes and back: a codec may come in that trusts no byte which it reads, and knows no network, task or
method.
"""
