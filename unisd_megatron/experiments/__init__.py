"""Sweeps: a grid of runs becomes a graph of prepare, train, evaluate and report, which Snakemake carries out. No torch."""
