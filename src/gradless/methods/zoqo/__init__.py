"""ZOQO: sign steps of integer codes."""
