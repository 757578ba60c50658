"""The configs that a split has copied: their bytes checked."""

from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from shardkit.checkpoint.folder import MAX_COMPANION
from shardkit.errors import ManifestError
from shardkit.files import read_small
from shardkit.manifest import Manifest

CONFIGS = ("config.json", "generation_config.json")


def read_configs(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """The configs that were copied, their bytes checked.  Raises ManifestError."""
    found = {}
    for name in CONFIGS:
        if name in manifest.copied:
            data = found[name] = read_small(folder / name, MAX_COMPANION, ManifestError)
            if sha256(data).hexdigest() != manifest.copied[name].sha256:
                raise ManifestError(
                    f"{folder / name}: not the file that was split with the weights"
                )
    return found


def open_configs(
    folder: Path, manifest: Manifest
) -> tuple[PreTrainedConfig, GenerationConfig | None]:
    """The model's config and its generation config, of the bytes that were checked."""
    with TemporaryDirectory(prefix="shardkit-") as checked:
        for name, data in read_configs(folder, manifest).items():
            Path(checked, name).write_bytes(data)
        config = AutoConfig.from_pretrained(checked)
        config.name_or_path = str(folder)
        has_generation = CONFIGS[1] in manifest.copied
        return config, GenerationConfig.from_pretrained(checked) if has_generation else None
