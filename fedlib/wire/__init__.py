"""Numbers to bytes and back: a codec comes in that knows no network, and answers any defect with `PayloadError`."""
