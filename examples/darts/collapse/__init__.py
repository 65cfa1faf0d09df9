"""A space of 64 networks, all of them trained, in which first-order DARTS collapses."""
