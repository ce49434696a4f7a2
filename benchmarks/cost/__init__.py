"""What the transform costs: memory traffic, time, compilation, state, beside its peers."""
