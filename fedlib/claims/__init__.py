"""Results read off the records: measures, benchmarks and the scores of claims may come in, but neither training nor
drawing.
"""
