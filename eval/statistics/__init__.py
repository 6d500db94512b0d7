"""How sure a score is: intervals, paired tests, families of tests, power, seeds. Pure functions on arrays."""
