"""Python imports this module at its start where its folder is on PYTHONPATH: see gpu_paths.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

import gpu_paths

gpu_paths.install()
