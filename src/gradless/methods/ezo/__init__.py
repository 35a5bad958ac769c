"""EZO: a direction for each example."""
