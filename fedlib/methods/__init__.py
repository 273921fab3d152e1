"""What is trained and sent: a method comes in that knows tasks and messages, but no engine and no run."""
