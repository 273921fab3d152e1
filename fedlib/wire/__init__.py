"""What travels between server and clients as bytes: message container, float32 tensors, bit masks, coded symbols.

Every reader here takes bytes that it does not trust: a defect raises `fedlib.errors.PayloadError` and nothing else.
"""
