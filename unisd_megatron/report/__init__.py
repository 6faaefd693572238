"""What runs and sweeps have left behind, as pages and pictures that people look at. No torch, no Megatron."""
