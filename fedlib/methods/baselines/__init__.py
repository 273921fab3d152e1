"""Methods of others to compare with: one may come in that is a single file and that no paper of this book is about."""
