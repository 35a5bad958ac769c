"""Reports: the contents of a file, and the loss curve and model card of a run."""
