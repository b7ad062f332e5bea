"""Folder of public data sets that some tests read and the project does not hold; they skip where it is absent."""

import os
from pathlib import Path

SHARED_DATA = Path(os.environ.get("CAI_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
