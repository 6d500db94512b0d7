"""This process: its rank, its environment, the status it ends with."""
