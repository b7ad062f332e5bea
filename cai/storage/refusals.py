"""What the operating system refuses, as a sentence for the user: a full disk, a path that cannot be written.

Libraries wrap its errors in their own. Those of safetensors end with `(os error 28)`; those of torch name the source
file of its archives, and not why writing failed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from cai.text.errors import BadInput, CaiError, StageFailed
from cai.text.formatting import printable

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""The machine's state, which no other command line changes."""
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
WRONG_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL,
              errno.ENXIO, errno.ENOTEMPTY, errno.EBUSY, errno.ETXTBSY}  # fmt: skip
LITTLE = 1 << 20
"""Bytes below which a disk counts as full."""
_OF_A_LIBRARY = re.compile(r"\(os error (\d+)\)")
_TORCH_WRITER = "inline_container.cc"


def refused_path(error: OSError) -> CaiError | None:
    """The sentence for a path of the command line that the system refuses; None for any other error."""
    if error.errno not in NO_ROOM | FORBIDDEN | WRONG_PATH:
        return None
    kind = StageFailed if error.errno in NO_ROOM else BadInput
    return kind(_sentence(error.errno, error.filename or "standard output"))


def refused_output(error: BaseException, folder: Path) -> StageFailed | None:
    """The sentence for an error while a stage writes into `folder`; None where something else is wrong."""
    number, path = None, str(folder)
    if isinstance(error, OSError):
        number, path = error.errno, str(error.filename or folder)
    elif match := _OF_A_LIBRARY.search(str(error)):
        number = int(match[1])
    elif _TORCH_WRITER in str(error):
        number = errno.ENOSPC if is_full(folder) else errno.EIO
    if number not in NO_ROOM | FORBIDDEN:
        return None
    return StageFailed(f"{_sentence(number, path)}; what is finished is kept, and the same command goes on from there")


def is_full(folder: Path) -> bool:
    """Whether the disk that a folder is on has next to no room."""
    return shutil.disk_usage(folder).free < LITTLE


def _sentence(number: int | None, path: str | bytes | int) -> str:
    reason = os.strerror(number or 0)
    return printable(f"{os.fsdecode(path) if isinstance(path, bytes) else path}: {reason[:1].lower()}{reason[1:]}")
