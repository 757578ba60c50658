"""How a `generate` of transformers' runs on an engine: as a row of the batch, or as a call."""

from collections.abc import Mapping
from typing import Any

import torch

from shardkit.errors import RequestError
from shardkit.runtime.engine.call_arguments import check_arguments, check_names, is_token_ids
from shardkit.runtime.engine.handle import Chunk, Handle
from shardkit.runtime.engine.messages import Message, call_request
from shardkit.runtime.engine.request_loop import Call
from shardkit.runtime.engine.running_model import RunningModel
from shardkit.runtime.engine.sampling_params import SamplingParams
from shardkit.runtime.engine.values import unpack_value

SEVERAL = ("num_beams", "num_return_sequences")  # options that a stream has at most one of


def begin_generate(
    model: RunningModel, arguments: Mapping[str, Any], seed: int | None
) -> Handle | Call:
    """Queue a generate: as a sequence if a row of the running batch can be one, else as a call.

    Raises RequestError, EngineBusy or RanksLost.
    """
    checked = _check(model, arguments, seed)
    if (handle := _queue_row(model, checked, seed, None)) is not None:
        return handle
    call = Call(call_request("generate", checked, seed=seed))
    model.loop.add_call(call)
    return call


def begin_stream(
    model: RunningModel, arguments: Mapping[str, Any], seed: int | None, tokenizer: Any | None
) -> Handle:
    """Queue a generate of one sequence, whose chunks come as they are made.

    Args:
        model: What runs it.
        arguments: Those of `generate`.
        seed: Makes sampling repeatable.
        tokenizer: Decodes the tokens; None for no text.

    Raises RequestError, EngineBusy or RanksLost.
    """
    checked = _check(model, arguments, seed)
    for name in SEVERAL:
        if (checked.get(name) or model.abilities.generation.get(name) or 1) > 1:
            raise RequestError(f"{name}: a stream is one sequence; use generate, or submit with n")
    if checked.get("return_dict_in_generate"):
        raise RequestError("return_dict_in_generate: a stream returns tokens; use generate")
    if (handle := _queue_row(model, checked, seed, tokenizer)) is not None:
        return handle
    ids = checked.get("input_ids")
    if isinstance(ids, torch.Tensor) and len(ids) > 1:
        raise RequestError(f"prompt: {len(ids)} rows; a stream is one sequence")
    prompt = () if ids is None else tuple(ids[0].tolist())
    return _queue_streamed_call(model, checked, seed, tokenizer, prompt)


def _check(model: RunningModel, arguments: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    SamplingParams(seed=seed)
    check_arguments(arguments)
    if not model.abilities.generates:
        raise RequestError("the model does not generate; call forward")
    check_names(arguments, model.abilities.generate_arguments)
    if is_token_ids(ids := arguments.get("input_ids")):
        model.planner.check_prompt(ids)
    return {**arguments}


def _queue_row(
    model: RunningModel, arguments: Mapping[str, Any], seed: int | None, tokenizer: Any | None
) -> Handle | None:
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if not is_token_ids(ids) or len(ids) != 1:
        return None
    if mask is not None and not (isinstance(mask, torch.Tensor) and bool((mask == 1).all())):
        return None
    options = {n: v for n, v in arguments.items() if n not in ("input_ids", "attention_mask")}
    handle = Handle(tuple(ids[0].tolist()), 1, None)
    sequence = model.planner.plan_row(handle, options, seed, tokenizer)
    if sequence is None:
        return None
    model.loop.add_sequences([sequence])
    return handle


def _queue_streamed_call(
    model: RunningModel,
    arguments: Mapping[str, Any],
    seed: int | None,
    tokenizer: Any | None,
    prompt: tuple[int, ...],
) -> Handle:
    handle = Handle(prompt, 1, None)
    text = None if tokenizer is None else model.planner.make_text(handle, (), tokenizer)

    def add_tokens(tokens: list[int]) -> bool:
        pieces = "".join(text.add(token) for token in tokens) if text else ""
        handle.add(Chunk(0, tuple(tokens), pieces))
        return not handle.done

    def finish(future: Any) -> None:
        if (error := future.exception()) is not None:
            handle.fail(error)
        else:
            handle.add(Chunk(0, text=text.flush() if text else "", finish_reason="stop"))

    call = Call(call_request("generate", arguments, seed=seed, stream=True), add_tokens)
    call.future.add_done_callback(finish)
    model.loop.add_call(call)
    return handle


def list_pieces(chunk: Chunk, as_text: bool) -> list[Any]:
    """What a stream yields of a chunk: its text, or its token ids."""
    return [chunk.text] * bool(chunk.text) if as_text else list(chunk.ids)


def read_output(response: Message) -> Any:
    """What a call has returned."""
    return unpack_value(response.header["output"], response.tensors)


def read_tokens(handle: Handle, ids: tuple[int, ...]) -> torch.Tensor:
    """The token ids `[1, T]`, int64, of a row: the prompt, and what was generated."""
    return torch.tensor([[*handle.prompt_ids, *ids]])
