"""The labs of the book: self-checks, small runs and notebooks to hand out come in, and no other room uses them."""
