"""Complete tasks: model, losses, data, evaluation and what they add to a run's report."""
