"""The micro-space: 625 networks, all of them trained, so that a search can be judged exactly."""
