"""What an estimator remembers: SAGA tables, where they lie, running averages."""
