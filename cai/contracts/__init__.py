"""Interfaces between layers: stage configs, references, context, profile, model, engine."""
