"""A recipe from its file to its results: reading, planning, running, reporting."""
