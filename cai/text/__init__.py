"""What people read on a terminal: messages, tables, progress."""
