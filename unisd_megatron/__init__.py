"""UniSD self-distillation on Megatron-core (arXiv 2605.06597).

Importing the package loads nothing heavy; import the room you need:
`unisd_megatron.losses`, `unisd_megatron.mechanisms` (pure torch), or run `unisd --help`.
"""

__version__ = "0.1.0"
