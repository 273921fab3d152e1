"""Where clients run: an engine comes in that gives the same uploads as `in_process`, the reference."""
