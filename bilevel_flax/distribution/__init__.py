"""What comes with the package (configs, examples, tasks of the bench) and what is an extra."""
