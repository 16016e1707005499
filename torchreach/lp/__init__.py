"""Linear programs: batched interior point on tensors, and the cvxpy reference."""
