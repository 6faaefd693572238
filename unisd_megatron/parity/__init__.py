"""Checks of the product on itself: golden vectors, and losses and gradients of every layout against one process."""
