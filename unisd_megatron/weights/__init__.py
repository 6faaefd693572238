"""Names and shapes between Hugging Face folders and Megatron shards. No Megatron here."""
