"""A run: its options, batches, start, steps and loop, and the trainer."""
