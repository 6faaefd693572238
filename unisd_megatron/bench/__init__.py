"""What things cost, measured: `make bench`. Every number comes from a fresh process, and is reported as a ratio of one run."""
