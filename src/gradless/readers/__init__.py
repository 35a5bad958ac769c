"""Parsers of what a file says about itself: they take no byte for granted, and what is there bounds time and memory."""
