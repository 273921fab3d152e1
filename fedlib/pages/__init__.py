"""What the pages of the book show, and how they are made: figures, tables and what executes notebooks come in."""
