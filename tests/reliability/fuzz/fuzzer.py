"""Fuzz one reader until libFuzzer stops.

    python -m tests.reliability.fuzz.fuzzer TARGET [libFuzzer options] [corpus folders]

`run.py` starts it, once for each target, as libFuzzer ends the process that it runs in.
"""

import sys
from random import Random

import atheris

with atheris.instrument_imports(include=["shardkit"]):
    from tests.reliability.fuzz.targets import SEEDS, TARGETS

OWN = 0.75  # of the changes; the rest are libFuzzer's, which know what comparisons saw


def main() -> None:
    target, rng = TARGETS[sys.argv[1]], Random()

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        rng.seed(seed)
        if rng.random() < OWN:
            return target.change(data, rng)[:max_size]
        changed: bytes = atheris.Mutate(data, max_size)
        return changed

    def check(data: bytes) -> None:
        target.check(data)  # libFuzzer would read the answer as an order

    for seed in (SEEDS / sys.argv[1]).iterdir():  # what is imported late must not count as slow
        check(seed.read_bytes())
    arguments = [sys.argv[0], f"-max_len={target.max_len}", *sys.argv[2:]]
    atheris.Setup(arguments, check, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
