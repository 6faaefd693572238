"""Scoring answers."""
