"""How the layer statistic and the transform hold up at the edges of the number formats."""
