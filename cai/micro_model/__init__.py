"""The embedded model: its corpus, pretraining and evaluation."""
