"""The tasks, one file each: what a file here defines is in `unisd_megatron.data.TASKS`, nothing else has to know."""
