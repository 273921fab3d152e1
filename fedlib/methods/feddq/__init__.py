"""FedDQ, which quantizes updates with fewer bits as training goes on: its quantizers and its schedules of bits may
come in.
"""
