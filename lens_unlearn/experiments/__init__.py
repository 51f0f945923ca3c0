"""The whole story of a run: a plan, its documents kept apart, folders that survive a kill, comparisons, sharing.

Knows everything below it; the command line and notebooks begin here.
"""
