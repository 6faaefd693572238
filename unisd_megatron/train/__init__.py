"""The order of work of a training run; no arithmetic of its own."""
