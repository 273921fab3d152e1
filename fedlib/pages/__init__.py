"""What the book's pages show and how they are made: figures, tables and the execution of notebooks may come in, one
file a paper.
"""
