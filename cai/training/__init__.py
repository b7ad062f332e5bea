"""Trainers, and everything between rows and a saved model. This module imports nothing, so that recipes are checked
without torch."""
