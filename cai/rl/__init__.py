"""Reinforcement learning: what responses are worth, how they are drawn, and the trainers that learn from both."""
