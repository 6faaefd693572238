"""`unisd selftest`: what holds on this machine, check by check, on one page.

Nothing heavy is imported here: every check is a program of its own, so one that crashes or hangs costs a line of the page.
"""
