"""Deep networks whose normalization layers were left out, and nothing else."""
