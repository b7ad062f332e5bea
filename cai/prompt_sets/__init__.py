"""Prompts and human preferences from files."""
