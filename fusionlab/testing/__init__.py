"""Kit for tests: random batches, causality by gradient, reference vectors."""
