"""How any folder is written: each byte once, hashed on the way, and whole or absent."""

from shardkit.output.destination import Destination, as_output_error
from shardkit.output.nonfinite import count_nonfinite, describe_nonfinite
from shardkit.output.publish import StagingFolder, publish_folder
from shardkit.output.resume import (
    Files,
    OutputFile,
    RunIdentity,
    count_file_bytes,
    identify_run,
    open_writers,
    remaining_copies,
)
from shardkit.output.rows import RowPart
from shardkit.output.stream import BlockReader, PlainReader, TensorCopy, TensorWriter, copy_tensors
from shardkit.output.writer import FileWriter, Inspection

__all__ = [
    "BlockReader",
    "Destination",
    "FileWriter",
    "Files",
    "Inspection",
    "OutputFile",
    "PlainReader",
    "RowPart",
    "RunIdentity",
    "StagingFolder",
    "TensorCopy",
    "TensorWriter",
    "as_output_error",
    "copy_tensors",
    "count_file_bytes",
    "count_nonfinite",
    "describe_nonfinite",
    "identify_run",
    "open_writers",
    "publish_folder",
    "remaining_copies",
]
