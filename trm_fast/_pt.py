"""``.pt`` files from outside: tensors and plain values, read without running any of their code.

A file of ``torch.save`` is a zip archive. Before torch reads one, its entries are found to be
stored as they are, so that none unpacks to more than the file has, and its pickle to name nothing
but what tensors and plain values are made of: ``weights_only`` also calls types that allocate as
much as the file says.
"""

import os
import pickletools
import zipfile
from io import BufferedReader
from pickle import UnpicklingError  # what torch.load raises; nothing is unpickled here
from struct import error as StructError
from typing import Any

import torch
from torch import Tensor, nn

from trm_fast._files import AnyPath, open_file
from trm_fast._json import MAX_DEPTH

_MODULES = {"torch", "torch.storage"}  # dtypes and storages
_NAMES = {
    "collections.OrderedDict",
    "collections.defaultdict",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch.serialization._get_layout",
    "_codecs.encode",
    "__builtin__.set",  # as protocol 2 calls it
}
_REFUSED = {"torch.Tensor"}
# Tensors that share memory count each; tied weights do.
_SHARING = 16
# Names, shapes and plain values of an archive. Read, an empty list takes 75 bytes for its one byte.
MAX_PICKLE = 4 << 20
# What the readers of zip and pickle raise on bytes that are none.
_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError,
    RuntimeError, StructError, TypeError, UnpicklingError, ValueError, zipfile.BadZipFile,
)  # fmt: skip


def load_pt(path: AnyPath, device: torch.device | str = "cpu") -> Any:
    """Returns what a file of ``torch.save`` holds.

    Memory is at most three times the size of the tensors in the file, and 16 times where they share
    values, and 100 times that of what else is in it, which may have ``MAX_PICKLE`` bytes.

    Args:
        path: the file.
        device: where the tensors shall be.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no ordinary file, is damaged, or holds something else than dense tensors
            and plain values, or too many of these.
    """
    with open_file(path) as file:
        try:
            _check_archive(file)
            file.seek(0)
            found = torch.load(file, map_location=device, weights_only=True)
            size = _size(found, set())
        except _Odd as error:
            reason = str(error)
        except _ERRORS:
            # torch's reasons advise to read the file with weights_only=False.
            reason = "one that is damaged"
        else:
            if size <= _SHARING * os.fstat(file.fileno()).st_size:
                return found
            reason = f"tensors of {size} bytes that the file does not have"
    raise ValueError(
        f"{os.fspath(path)}: a file of torch.save with tensors and plain values is required; "
        f"got {reason}"
    )


class _Odd(Exception):
    """Why a file is not read."""


def _check_archive(file: BufferedReader) -> None:
    if not zipfile.is_zipfile(file):
        raise _Odd("something else")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise _Odd("compressed entries")
        if sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size:
            raise _Odd("entries that are larger than the file")
        size = pickle_size(archive)
        if size > MAX_PICKLE:
            raise _Odd(f"{size} bytes beside the tensors, of which at most {MAX_PICKLE} are read")
        _check_names(archive.read(_pickle_of(archive)))


def pickle_size(archive: zipfile.ZipFile) -> int:
    """Returns the bytes of what an archive of ``torch.save`` has beside its tensors."""
    return _pickle_of(archive).file_size


def _pickle_of(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    # torch finds it whatever the case of its letters.
    names = ((entry, entry.filename.lower()) for entry in archive.infolist())
    found = [entry for entry, name in names if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise _Odd(f"an archive with {len(found)} data.pkl")
    return found[0]


def _check_names(data: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name != "GLOBAL":
            continue
        name = str(argument).replace(" ", ".")
        known = name in _NAMES or name.rpartition(".")[0] in _MODULES
        if name in _REFUSED or not known:
            raise _Odd(f"a {name[:80]!r}")


def _size(value: Any, seen: set[int], depth: int = 0) -> int:
    """Returns the bytes of all tensors, after each was found dense."""
    # Without memory of its own, or met before.
    if not isinstance(value, (Tensor, dict, list, tuple, set)) or id(value) in seen:
        return 0
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
            raise _Odd(f"a {type(value).__name__} of layout {value.layout}")
        if value.is_meta or value.is_quantized:
            raise _Odd(f"a tensor of {value.dtype} on {value.device}")
        size = value.numel() * value.element_size()
    elif not value:
        return 0
    else:
        # What contains itself is deeper than any bound.
        if depth == MAX_DEPTH:
            raise _Odd(f"values that are nested more than {MAX_DEPTH} deep")
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        size = sum(_size(item, seen, depth + 1) for item in inner)
    seen.add(id(value))
    return size
