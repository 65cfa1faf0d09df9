"""Hyperparameter selection: one l2 penalty for each feature or class of a linear classifier."""
