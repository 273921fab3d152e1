"""The labs of the book: self-checks, small runs and the notebooks to hand out may come in, and nothing outside
imports them.
"""
