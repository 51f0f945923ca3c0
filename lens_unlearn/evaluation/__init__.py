"""Measuring what an intervention removed, and what else it cost."""
