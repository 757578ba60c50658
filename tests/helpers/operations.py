"""What operations of torch's run."""

from collections.abc import Iterable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class RecordNames(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In a `with`, `names` is of the operations that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
