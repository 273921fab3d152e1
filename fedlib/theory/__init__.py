"""The numbers behind the chapters of theory, one file a paper: what computes them comes in, not what draws them."""
