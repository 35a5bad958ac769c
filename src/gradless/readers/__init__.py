"""Parsers of file headers. They trust no byte, and the size of the file bounds their time and memory."""
