"""Importing this makes a process lead a session of its own: signals for a terminal or a job pass it by.

The first thing that the process imports from which stages are forked (`cai.run.launch`): ended by such a signal, it
would take with it what is known of its children, which are to write a checkpoint first.
"""

import os

os.setsid()
