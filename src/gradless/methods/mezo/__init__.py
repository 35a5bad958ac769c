"""MeZO, the full-precision baseline."""
