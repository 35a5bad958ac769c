"""The methods, a folder each: the equations in `method.py`, everything else that a run must know in `recipe.py`."""
