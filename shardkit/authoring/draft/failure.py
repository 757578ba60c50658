"""Why a recipe could not be drafted."""

import re
from typing import Literal

from shardkit.errors import RecipeError

Stage = Literal[
    "model class", "tiny model", "checkpoint", "replicated", "nothing", "proof", "error", "crash",
    "time limit",
]  # fmt: skip
STAGES: dict[Stage, str] = {
    "model class": "transformers has no model class for the type alone",
    "tiny model": "no model of the default config, made small by its fields' names, can be built"
    " and run",
    "checkpoint": "the saved tiny model cannot be read as a checkpoint",
    "replicated": "the model fails a check even if every rank holds all of it",
    "nothing": "nothing of it could be sharded",
    "proof": "the draft fails a check over 2 or 4 ranks",
    "error": "an unexpected error",
    "crash": "the process that drafted it crashed",
    "time limit": "it took longer than the time limit",
}
SCRATCH = "shardkit-draft-"  # how the temporary folders of drafts are named


class DraftError(RecipeError):
    """No recipe can be drafted.

    Attributes:
        stage: How far the draft came.
        reason: What went wrong at that stage.
    """

    def __init__(self, stage: Stage, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.stage = stage
        self.reason = reason or message


def hide_paths(text: str) -> str:
    """The text without the paths of temporary folders, which mean nothing to a reader."""
    return re.sub(rf"\S*/{SCRATCH}[^\s:]*", "the draft", text)
