"""The only room that imports megatron and transformer_engine."""
