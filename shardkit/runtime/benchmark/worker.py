"""What the process of each rank runs: `python -m shardkit.runtime.benchmark.worker FOLDER JOB`.

JOB is JSON. What was measured, or why nothing was, is written to FOLDER, a file for each rank.
"""

import json
import sys
from pathlib import Path

from shardkit.errors import ShardkitError, first_line
from shardkit.runtime.benchmark.contenders import Contender, read_workload
from shardkit.runtime.benchmark.measure_rank import measure_rank
from shardkit.runtime.distributed.rank_environment import read_place

FAILED = 3


def main(folder: str, job: str) -> int:
    """Measure a rank; the exit code."""
    given = json.loads(job)
    workload = read_workload(given.pop("workload"))
    contender = Contender(**{**given, "folder": Path(given["folder"])})
    try:
        result = measure_rank(contender, workload)
    except ShardkitError as error:
        result = {"error": str(error)}
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        # What transformers raises of a model that it cannot load or divide.
        result = {"error": f"{type(error).__name__}: {first_line(error)}"}
    place = read_place()
    path = Path(folder, f"rank-{place.rank if place else 0}.json")
    path.write_text(json.dumps(result))
    return FAILED if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
