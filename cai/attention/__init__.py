"""Attention for engines and training: patched attention, shared prefixes, token trees, and all tuning for CPUs."""
