"""Checkpoint formats, one file each with a reader and a writer. An untuned checkpoint is written back byte for byte."""
