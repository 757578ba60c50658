"""Are the shards right?  Three levels: the files, the weights, the numbers they compute."""

from shardkit.verify.files import check_files
from shardkit.verify.report import Check, Report
from shardkit.verify.weights import check_weights

__all__ = ["Check", "Report", "check_files", "check_weights"]
