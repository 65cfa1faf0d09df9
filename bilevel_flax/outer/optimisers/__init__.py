"""Optax transformations for x: rows that move when they are visited, steps in units of x."""
