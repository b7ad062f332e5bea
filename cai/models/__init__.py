"""Models: found by name, loaded, saved; conversations as token ids; reward models."""
