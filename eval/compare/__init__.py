"""Two or more evaluations against each other, document by document."""
