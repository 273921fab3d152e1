"""The numbers behind the theory chapters, one file a paper: what computes a chapter's tables and curves may come in."""
