"""QuZO: integer codes by stochastic rounding."""
