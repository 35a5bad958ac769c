"""Black-box attacks: the methods that tune weights, searching images instead."""
