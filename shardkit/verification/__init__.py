"""Are the shards right? Three levels: the files, the weights, the numbers they compute."""

from shardkit.verification.files import check_files
from shardkit.verification.levels import verify
from shardkit.verification.numerics_options import NumericsOptions
from shardkit.verification.report import Check, Report
from shardkit.verification.request import Level
from shardkit.verification.weights import check_weights

__all__ = ["Check", "Level", "NumericsOptions", "Report", "check_files", "check_weights", "verify"]
