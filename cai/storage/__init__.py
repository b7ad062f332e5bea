"""Files on disk: rows, journal, run folder."""
