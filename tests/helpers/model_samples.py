"""The test table: every sample of recipes/samples, made once a session."""

from collections.abc import Callable
from pathlib import Path

from shardkit.authoring.samples import list_samples, make_sample

SampleFolder = Callable[[str], Path]  # a sample's checkpoint, saved when first asked for
VARIANTS = {sample.name: sample for sample in list_samples()}


def make(name: str, folder: Path, dtype: str = "float32") -> Path:
    """Save a sample's model as transformers does, its weights from a seed.  Returns `folder`."""
    import torch

    return make_sample(VARIANTS[name], folder, getattr(torch, dtype))
