"""The tasks of the bench that need more than the package."""
