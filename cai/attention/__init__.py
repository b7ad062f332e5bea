"""What engines and trainers share: attention over shared prefixes, and what is tuned for CPUs."""
