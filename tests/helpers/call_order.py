"""Prints the functions of shardkit that a split and a load on a rank call, in their order.

`python -m tests.helpers.call_order SOURCE FOLDER`: SOURCE is a checkpoint; FOLDER is made.
"""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import shardkit
from shardkit import runtime

PACKAGE = Path(shardkit.__file__).parent


def record_calls(run: Callable[[], object]) -> list[str]:
    """The functions of shardkit that `run` calls, in any thread: `output.stream.copy_tensors`."""
    names: list[str] = []
    modules: dict[str, str] = {}

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and (module := name_module(frame.f_code.co_filename)):
            names.append(f"{module}.{frame.f_code.co_qualname}")

    def name_module(file: str) -> str:
        if file not in modules:
            path = Path(file)
            is_ours = path.is_relative_to(PACKAGE)
            parts = path.relative_to(PACKAGE).with_suffix("").parts if is_ours else ()
            modules[file] = ".".join(parts)
        return modules[file]

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return names


if __name__ == "__main__":
    source, folder = sys.argv[1], Path(sys.argv[2])
    split = record_calls(lambda: shardkit.split(source, folder, 1))
    load = record_calls(lambda: runtime.load(folder))
    print(json.dumps({"split": split, "load": load}))
