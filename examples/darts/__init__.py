"""Architecture search: the operations of DARTS and NAS-Bench-201 as one differentiable network."""
