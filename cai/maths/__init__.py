"""Losses, statistics and text measures: pure functions, no input or output."""
