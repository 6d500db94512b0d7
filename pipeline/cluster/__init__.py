"""Several nodes, and the scheduler that lends them."""
