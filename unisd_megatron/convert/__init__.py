"""Whole checkpoints: opening either kind, importing, exporting, comparing."""
