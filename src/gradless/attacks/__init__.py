"""Black-box attacks: the methods that tune weights search images here. Only the command line imports this room."""
