"""What the records say: a measure, a benchmark or a score of claims comes in, but nothing that trains or draws."""
