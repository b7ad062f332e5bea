"""What lies on disk: rows, journal, run folder."""
