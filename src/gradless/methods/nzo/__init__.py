"""NZO: perturbed outputs of the last layers, for answers of one word."""
