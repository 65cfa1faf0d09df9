"""Whether a run learns what it should: residual, cosine, ranges, a budget for both."""
