"""Where clients run: an engine may come in if it gives the same uploads as the reference in
`fedlib.engines.select.in_process`.
"""
