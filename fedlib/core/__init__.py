"""What the server and every client agree on: a thing comes in that knows no single method, engine or run."""
