"""QZO: scales of quantized weights."""
