"""Messages between the controlling process and a rank."""

import torch

from shardkit.runtime.engine.messages import Message, decode_message, encode_message


def test_a_tensor_by_two_names_arrives_by_both() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    sent = Message({"n": 1}, {"whole": tensor, "again": tensor, "part": tensor[1]})
    message = decode_message(b"".join(encode_message(sent)))
    assert message.header == {"n": 1}
    for name, expected in sent.tensors.items():
        assert torch.equal(message.tensors[name], expected)
