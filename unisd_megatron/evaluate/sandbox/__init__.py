"""Runs programs that nobody has read; docs/sandbox.md says how, and what remains possible."""

from unisd_megatron.evaluate.sandbox.host import Sandbox
from unisd_megatron.evaluate.sandbox.limits import Limits, Outcome

__all__ = ["Limits", "Outcome", "Sandbox"]
