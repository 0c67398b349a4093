"""The mathematics of one step, SPMD: candidates, loss, plan, gradient caching, collectives."""
