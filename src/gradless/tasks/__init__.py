"""From rows of a data file to examples: prompts, verbalizers and the built-in tasks."""
