"""Ours against the plain way, side by side. Every file here runs alone; its first lines say what it measures.

The files import one another as `benchmarks.*`, which works in the environment that the Makefile makes: its editable
installation puts the checkout on the import path.
"""
