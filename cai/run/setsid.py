"""Importing this makes a process lead a session of its own, unreached by signals to a terminal's or job's group.

The fork server (`cai.run.launch`) imports it first: if such a signal ended the fork server, the parent would lose the
exit codes of its children, which write a resume point first.
"""

import os

os.setsid()
