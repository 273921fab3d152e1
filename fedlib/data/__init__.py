"""Data sets, their checksums and their partitions: what fetches, reads or divides samples may come in, and nothing
that trains.
"""
