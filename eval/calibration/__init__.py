"""How far confidence can be trusted: pure functions on arrays. D documents, C choices, N members, B bins."""
