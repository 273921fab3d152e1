"""Methods of others to compare with: one comes in that fits into a file and that no page of this book is about."""
