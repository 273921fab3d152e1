"""Data sets, checksums and partitions: what fetches, reads or divides samples comes in, and nothing that trains."""
