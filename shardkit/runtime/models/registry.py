"""Model classes by name: transformers' own, and those built in here."""

import transformers
from transformers import PreTrainedModel

from shardkit.runtime.models import lstm as lstm_model

BUILT_IN = (lstm_model,)


def find_model_class(name: str) -> type[PreTrainedModel] | None:
    """The model class of a name that a config states under `architectures`; None for no model."""
    for module in (transformers, *BUILT_IN):
        model_class = getattr(module, name, None)
        if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
            return model_class
    return None
