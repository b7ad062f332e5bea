"""Experiments on the embedded model that docs/findings.md rests on. Every file with a `main` runs alone."""
