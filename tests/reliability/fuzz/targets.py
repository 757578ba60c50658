"""The readers that are fuzzed: what must hold of each, how its inputs change, and how large."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.reliability.fuzz import mutations, oracles

SEEDS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Target:
    """A reader.  `share` is its part, in percent, of a run over all of them."""

    check: Callable[[bytes], bool]
    change: Callable[[bytes, Random], bytes]
    max_len: int
    share: int


TARGETS = {
    "header": Target(oracles.check_header, mutations.change_header, 640, 60),
    "index": Target(oracles.check_index, mutations.change_json, 512, 15),
    "config": Target(oracles.check_config, mutations.change_json, 512, 10),
    "manifest": Target(oracles.check_manifest, mutations.change_manifest, 2560, 8),
    "recipe": Target(oracles.check_recipe, mutations.change_recipe, 768, 7),
}
if oracles.JOURNAL is not None:
    TARGETS["journal"] = Target(oracles.check_journal, mutations.change_lines, 1024, 5)
