"""A rank process of `RankProcesses`, of which rank 1 fails before it joins, as FAULT says."""

import json
import os
import sys

from shardkit.runtime.engine.worker import main
from tests.helpers.rank_programs import FAULTS, pretend

if __name__ == "__main__":
    fault = os.environ["FAULT"]
    if json.loads(sys.argv[1])["environment"]["RANK"] == "1":
        if fault in FAULTS:
            FAULTS[fault]()
        else:
            pretend({fault: "1.0"})
    sys.exit(main(sys.argv[1:]))
