"""The methods, a folder each: its equations (`method.py`) and all that a run must know of it (`recipe.py`)."""
