"""What can be said of a run before it starts: what is wrong, what it takes, what will be learned."""
