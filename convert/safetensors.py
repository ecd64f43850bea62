"""Safetensors files without torch: a strict memory-mapped reader and a streaming writer.

    with TensorFile("model.safetensors") as file:
        for name in file.names:
            use(file.read(name))     # a view, no copy
            file.release(name)       # its pages leave this process

Model folders and sharded checkpoints are `convert.checkpoint_files`; the checks that make a file
safe to read are `convert.safetensors_header`.
"""

from __future__ import annotations

from typing import BinaryIO

from convert.mapped_file import MappedFile
from convert.safetensors_header import TensorInfo, read_header
from convert.safetensors_writer import TensorSpec, write_safetensors, write_sharded

__all__ = ["TensorFile", "TensorInfo", "TensorSpec", "write_safetensors", "write_sharded"]


class TensorFile(MappedFile):
    """One safetensors file; see `MappedFile`.

    Attributes: those of `MappedFile`, and `metadata` (dict of str to str).
    """

    def _parse(self, file: BinaryIO) -> dict[str, TensorInfo]:
        infos, self.metadata = read_header(file, self.path, self.size)
        return infos
