"""Output for people on a terminal: messages, tables, progress."""
