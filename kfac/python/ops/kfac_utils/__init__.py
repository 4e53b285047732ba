"""Schedules around the optimizer, and data readers that remember the last batch."""
