"""Are the shards right? Three levels: the files, the weights, the numbers they compute."""

from shardkit.verification.files import check_files
from shardkit.verification.levels import Level, verify
from shardkit.verification.report import Check, Report
from shardkit.verification.weights import check_weights

__all__ = ["Check", "Level", "Report", "check_files", "check_weights", "verify"]
