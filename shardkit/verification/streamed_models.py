"""Models whose weights are read as they run: the unsharded one, and one rank's part of it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from shardkit.checkpoint import Checkpoint
from shardkit.errors import CheckpointError, ManifestError, first_line
from shardkit.recipe.formats import Grouping, group_checkpoint, list_weights
from shardkit.runtime.config import GENERATION_CONFIG, read_source_config
from shardkit.runtime.conversion import Conversion, find_conversions
from shardkit.runtime.dequantize import store_weight
from shardkit.runtime.distributed.group import TensorParallelGroup
from shardkit.runtime.layers.experts import choose_expert_kernel
from shardkit.runtime.loader import finish_rank, list_added_once, prepare_rank
from shardkit.runtime.materialize import fill_parameters, tie_and_initialize
from shardkit.runtime.model_runner import ModelRunner
from shardkit.runtime.packed import compute_tensor
from shardkit.runtime.packing import pack_excerpt, pack_weights
from shardkit.runtime.rank_shard import RankShard, build_on_meta, resolve_model_class
from shardkit.runtime.weights import allocate_tensor, find_torch_dtype, read_new_tensors
from shardkit.shards.integrity import RankReader
from shardkit.tensor import TensorSpec
from shardkit.verification.models import PromotedArguments
from shardkit.verification.plain_weights import compute_weight
from shardkit.verification.streamed_weights import ByteCounts, StreamedWeights

CPU = torch.device("cpu")
META = torch.device("meta")

ReadTensor = Callable[[str], torch.Tensor]
CountLengths = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class StreamedModel:
    """A model, and what gives it its weights while it runs."""

    model: PreTrainedModel
    weights: StreamedWeights

    @property
    def runner(self) -> ModelRunner:
        """What calls the model, inside of `running`."""
        return ModelRunner(self.model, CPU)

    def running(self) -> AbstractContextManager[None]:
        """The `with` in which the model may be called."""
        return self.weights.running()

    def promoting(self) -> AbstractContextManager[object]:
        """The `with` that a float64 model needs around it."""
        return PromotedArguments() if self.model.dtype == torch.float64 else nullcontext()


@dataclass(frozen=True)
class _Maker:
    """Makes a model's tensors out of those on disk: `zeros` are zero instead."""

    whole: PreTrainedModel
    conversions: Mapping[str, Conversion]
    read: ReadTensor
    count_lengths: CountLengths | None = None
    zeros: frozenset[str] = frozenset()

    def make(self, name: str) -> dict[str, torch.Tensor]:
        conversion = self.conversions[name]
        stored = {source: self.read(source) for source, _ in conversion.sources}
        tensors = conversion.run(stored, self.whole, self.count_lengths)
        return {n: torch.zeros_like(t) if n in self.zeros else t for n, t in tensors.items()}


@dataclass
class SourceTensors:
    """The tensors of an unsharded checkpoint, for several models that run block by block together.

    A tensor that the first of them reads is kept until each has had it, or the block has ended.

    Attributes:
        checkpoint: The open checkpoint.
        readers: How many models there are.
        counts: Where what is read and kept is counted.
    """

    checkpoint: Checkpoint
    readers: int
    counts: ByteCounts
    _kept: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        specs = self.checkpoint.specs()
        self._specs = {spec.name: spec for spec in specs}
        self.grouping: Grouping = group_checkpoint(specs, self.checkpoint.config)
        self._quantized = {weight.name: weight for weight in self.grouping.weights.values()}

    @property
    def weights(self) -> Sequence[TensorSpec]:
        """The tensors, each quantized weight as one."""
        return list_weights(list(self._specs.values()), self.grouping)

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, or a quantized weight in float32."""
        if name in self._kept:
            tensor, readers = self._kept.pop(name)
            self.counts.add(-tensor.nbytes)
        else:
            tensor, readers = self._compute(name), self.readers
        if readers > 1:
            self._kept[name] = tensor, readers - 1
            self.counts.add(tensor.nbytes)
        return tensor

    def clear(self) -> None:
        """Keep nothing: the block has ended."""
        self.counts.add(-sum(tensor.nbytes for tensor, _ in self._kept.values()))
        self._kept.clear()

    def _compute(self, name: str) -> torch.Tensor:
        """By another path than the runtime's."""
        weight = self._quantized.get(name)
        if weight is None:
            return self._read(name)
        value = compute_weight(
            weight, {part.name: self._read(part.name) for _, part in weight.parts}
        )
        return value.mT.contiguous() if weight.axes == ("in", "out") else value

    def _read(self, name: str) -> torch.Tensor:
        tensor, view = allocate_tensor(self._specs[name])
        self.checkpoint.read_into(name, 0, view)
        self.counts.read += len(view)
        return tensor


def stream_unsharded(source: SourceTensors, dtype: torch.dtype) -> StreamedModel:
    """The unsharded model in a dtype, as transformers has it, without weights of its own.

    Raises CheckpointError if the checkpoint does not make every tensor that the model needs.
    """
    folder, prefix = source.checkpoint.folder, source.checkpoint.wrapper_prefix
    config = read_source_config(folder)
    model_class = resolve_model_class(config)
    try:
        with META:
            model, whole = (model_class._from_config(config, dtype=dtype) for _ in range(2))
    except Exception as fault:  # whatever a model class raises at its config
        raise CheckpointError(
            f"{folder}: transformers cannot build it: {type(fault).__name__}: {first_line(fault)}"
        ) from None
    model.requires_grad_(False).eval()
    stubs = {spec.name: _make_stub(spec) for spec in source.weights}
    shapes = {name: tuple(stub.shape) for name, stub in stubs.items()}
    conversions = find_conversions(whole, shapes, prefix)
    tensors, by_target = _fill_with_stubs(model, whole, conversions, stubs, None)
    missing = model.state_dict().keys() - tensors.keys()
    try:
        tie_and_initialize(model, missing, CPU)
    except ManifestError as error:
        name = str(error).partition(":")[0]
        raise CheckpointError(f"{folder}: {name} is not in the checkpoint") from None
    if dtype == torch.float64:  # a few classes make parameters that stay float32
        for parameter in model.parameters():
            parameter.data = parameter.data.double()
    if model.can_generate() and (folder / GENERATION_CONFIG).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    maker = _Maker(whole, by_target, source.read)
    return _finish_streamed(model, tensors, maker, source.counts)


def stream_rank(
    shard: RankShard,
    group: TensorParallelGroup,
    reader: RankReader,
    whole: PreTrainedModel,
    counts: ByteCounts,
) -> StreamedModel:
    """A rank's part of the model, without weights of its own: they come from the rank's file.

    Args:
        shard: What the rank is to load.
        group: The ranks.
        reader: The rank's open file.
        whole: The whole model on the meta device, as it was built, in the dtype to compute in.
        counts: Where what is read and kept is counted.

    Raises:
        ManifestError: The model is not the one that the manifest describes.
    """
    dtype = whole.config.dtype
    model = build_on_meta(shard, dtype)
    parts = prepare_rank(model, shard, group)
    by_part = parts.weights_by_part
    specs = {spec.name: spec for spec in reader.specs if spec.name in parts.stored_names}
    stored = ((name, _make_stub(spec)) for name, spec in specs.items())
    packed = pack_weights(stored, by_part, dtype, parts.excerpts)
    stubs = {n: torch.empty(t.shape, dtype=t.dtype, device=META) for n, t in packed}
    tensors, by_target = _fill_with_stubs(
        model, whole, parts.conversions, stubs, parts.count_lengths
    )
    finish_rank(model, shard, parts, CPU)
    quantized = {weight.name: weight for weight in by_part.values()}

    def read_tensor(name: str) -> torch.Tensor:
        if (weight := quantized.get(name)) is None:
            return _read_part(reader, specs[name], counts)
        stored = {p.name: _read_part(reader, specs[p.name], counts) for _, p in weight.operands}
        return compute_tensor(
            pack_excerpt(store_weight(weight, stored), dtype, parts.excerpts.get(name))
        )

    zeros = frozenset() if shard.rank.is_first else frozenset(list_added_once(parts))
    maker = _Maker(whole, by_target, read_tensor, parts.count_lengths, zeros)
    return _finish_streamed(model, tensors, maker, counts)


def _read_part(reader: RankReader, spec: TensorSpec, counts: ByteCounts) -> torch.Tensor:
    (tensor,) = read_new_tensors(reader, [spec])
    counts.read += spec.nbytes
    return tensor


def _make_stub(spec: TensorSpec) -> torch.Tensor:
    dtype = find_torch_dtype(spec.dtype)
    if dtype is None:
        raise ManifestError(f"{spec.name}: torch has no dtype that holds {spec.dtype}")
    return torch.empty(spec.shape, dtype=dtype, device=META)


def _fill_with_stubs(
    model: PreTrainedModel,
    whole: PreTrainedModel,
    conversions: list[Conversion],
    stubs: Mapping[str, torch.Tensor],
    count_lengths: CountLengths | None,
) -> tuple[dict[str, torch.Tensor], dict[str, Conversion]]:
    """Fill a model with tensors on the meta device; by name these, and what makes each.

    Raises CheckpointError if a whole tensor has not the shape that the model has.
    """
    by_target = {}
    for conversion in conversions:
        stored = {source: stubs[source] for source, _ in conversion.sources}
        for name, tensor in conversion.run(stored, whole, count_lengths).items():
            have = tuple(whole.get_parameter_or_buffer(name).shape)
            if count_lengths is None and have != tuple(tensor.shape):
                raise CheckpointError(
                    f"{conversion.sources[0][0]}: makes {name} {tuple(tensor.shape)}, but"
                    f" config.json says {have}"
                )
            by_target[name] = conversion
    used = {source for conversion in conversions for source, _ in conversion.sources}
    given = [(name, stub) for name, stub in stubs.items() if name in used]
    lengths = count_lengths or (lambda name: ())
    fill_parameters(model, given, conversions, model.config.dtype, lengths, is_packed=False)
    return {name: model.get_parameter_or_buffer(name) for name in by_target}, by_target


def _finish_streamed(
    model: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    maker: _Maker,
    counts: ByteCounts,
) -> StreamedModel:
    for module in model.modules():
        if isinstance(module, nn.RNNBase):  # which keeps a list of its own
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    choose_expert_kernel(model)
    return StreamedModel(model, StreamedWeights(model, tensors, maker.make, counts))
