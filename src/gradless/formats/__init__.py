"""Checkpoint formats: one file each, a reader and a writer. Unchanged in, byte-identical out."""
