"""The evaluation library: lm-eval with the ensemble inside, and the report."""
