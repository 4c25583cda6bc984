"""Reads `.pth` files that torch.save wrote, and compares the checksums in them, which torch.load does not."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from .files import file_size
from ..ops.library import OWN_TYPES
from ..ops.values import shown

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHARD = re.compile(r"consolidated\.\d\d")


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` file by name, their memory mapped from the file.

    Every byte of the archive is compared with its CRC32 first, at about 2 GB/s a core; unpickling is with
    `weights_only=True`. A file that is no archive of torch.save, or holds anything but tensors, is a ValueError.
    """
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of kinds of tensors that `check_tensor` refuses
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a pickle can make the unpickler raise anything
        reason = shown((str(error).splitlines() or [type(error).__name__])[0][:150])
        raise ValueError(f"{path}: torch.load with weights_only=True refuses it: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a dictionary of tensors, got {shown(content)}")
    for name in content:
        if not isinstance(name, str):
            raise ValueError(f"{path}: names of tensors must be strings, got {shown(name)}")
    return content


def check_tensor(path: Path, name: str, tensor: object, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless `tensor` is a plain tensor of real floating-point numbers with this shape."""
    problem = None
    if type(tensor) not in OWN_TYPES:
        problem = f"must be a tensor, got {type(tensor).__name__}"
    elif tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "quantized" if tensor.is_quantized else "a meta tensor" if tensor.is_meta else str(tensor.layout)
        problem = f"must be a dense tensor, got {kind}"
    elif tensor.dtype not in _DTYPES:
        problem = f"must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
    elif tensor.shape != shape:
        problem = f"must have shape {shape}, got {tuple(tensor.shape)}"
    if problem:
        raise ValueError(f"{path}: `{name}` {problem}")


def _check_archive(path: Path) -> None:
    file_size(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(len(_ZIP))
        if magic.startswith(_PICKLE):
            raise ValueError("is in the format that torch had before 1.6; torch.load it and torch.save it again")
        if magic != _ZIP:
            raise ValueError("is no archive that torch.save wrote")
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = {record.filename for record in records}
            if len(names) != len(records) or min(record.header_offset for record in records):
                raise ValueError("is no archive as torch.save writes them")
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise ValueError("is compressed, which torch.save does not do")
            if damaged := archive.testzip():
                raise ValueError(f"is damaged: the checksum of {shown(damaged)} in it is another")
            folder = min(names).partition("/")[0]
    except Exception as error:  # damaged bytes can make the reader of archives raise anything
        reason = str(error) if type(error) is ValueError else f"is damaged or cut short ({shown(str(error)[:100])})"
        raise ValueError(f"{path}: {reason}") from error
    if _SHARD.fullmatch(folder) and folder != path.stem:
        raise ValueError(f"{path}: was written as {folder}.pth, another shard")
