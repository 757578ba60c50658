"""The endpoint that embeds texts: an encoder's token vectors, pooled and of length 1."""

import asyncio
import base64
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from shardkit.errors import RequestError
from shardkit.serve.disconnects import run_while_connected
from shardkit.serve.generation_request import check_fields
from shardkit.serve.request_body import read_body
from shardkit.serve.request_guard import RequestRecord
from shardkit.serve.serve_options import Pooling
from shardkit.serve.service import Service

if TYPE_CHECKING:
    import torch

FIELDS = {"model", "input", "encoding_format", "user", "dimensions"}
HIDDEN = "last_hidden_state"


async def answer_embeddings(request: Request) -> Response:
    """POST /v1/embeddings."""
    service: Service = request.scope["service"]
    body = await read_body(request, service.options.max_body_bytes)
    fields = check_fields(body, FIELDS, service.options)
    if "dimensions" in fields:
        raise RequestError("dimensions: this server does not support it; leave it out")
    encoding = fields.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise RequestError(f"encoding_format={encoding!r:.80}: it must be float or base64")
    texts = list_inputs(fields.get("input"), service.options.max_prompts)
    vectors, num_tokens = await run_while_connected(request.receive, embed_texts(service, texts))
    record: RequestRecord = request.scope["record"]
    record.facts |= service.count_tokens(num_tokens, 0)
    data = [
        {"object": "embedding", "index": at, "embedding": encode_vector(vector, encoding)}
        for at, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    model = service.options.model
    return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage})


def list_inputs(given: Any, most: int) -> list[Any]:
    """The inputs, each a text or token ids. Raises RequestError."""
    is_one = isinstance(given, str) or (
        isinstance(given, list) and bool(given) and all(isinstance(each, int) for each in given)
    )
    texts = [given] if is_one else given
    if not isinstance(texts, list) or not texts:
        raise RequestError("input: it must be a text, a list of token ids, or a list of those")
    if len(texts) > most:
        raise RequestError(f"input: {len(texts)}, of at most {most} in a request")
    if not all(isinstance(each, str | list) and each for each in texts):
        raise RequestError("input: each must be a text or a list of token ids that is not empty")
    return texts


async def embed_texts(service: Service, texts: Sequence[Any]) -> tuple[list[list[float]], int]:
    """The vector of each input, in one forward pass, and how many tokens they have."""
    rows = await asyncio.to_thread(lambda: [service.engine.input_ids(text)[0] for text in texts])
    inputs = pad_rows(rows)
    outputs: Mapping[str, torch.Tensor] = await service.engine.aforward(**inputs)
    if HIDDEN not in outputs:
        raise RequestError(f"the model has no {HIDDEN}: it is no encoder, and embeds nothing")
    pooled = pool_rows(outputs[HIDDEN], inputs["attention_mask"], service.options.pooling)
    return pooled.tolist(), sum(map(len, rows))


def pad_rows(rows: Sequence["torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """Token ids `[B, T]` and their mask, both int64, of rows padded at their ends."""
    import torch

    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row)], mask[at, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def pool_rows(hidden: "torch.Tensor", mask: "torch.Tensor", pooling: Pooling) -> "torch.Tensor":
    """One vector of length 1 for each row, `[B, H]` float32, of token vectors `[B, T, H]`."""
    import torch

    hidden, lengths = hidden.float(), mask.sum(1)
    match pooling:
        case "mean":
            pooled = (hidden * mask[..., None]).sum(1) / lengths[:, None]
        case "cls":
            pooled = hidden[:, 0]
        case "last":
            pooled = hidden[torch.arange(len(hidden)), lengths - 1]
    return torch.nn.functional.normalize(pooled, dim=-1)


def encode_vector(vector: Sequence[float], encoding: str) -> list[float] | str:
    """A vector as numbers, or as base64 of float32, little-endian."""
    if encoding == "float":
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
