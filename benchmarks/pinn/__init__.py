"""Physics-informed networks: problems, networks, optimizer arms and the training loop."""
