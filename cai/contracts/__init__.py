"""What layers agree on: stage configs, references, context, profile, engine interface."""
