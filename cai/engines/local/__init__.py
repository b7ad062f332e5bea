"""The engine that computes in this process, with transformers and torch."""
