"""The socket that a server listens on."""

import asyncio
import socket

import pytest

from shardkit.errors import UsageError
from shardkit.serve.run_server import bind_socket


def test_each_piece_of_an_answer_is_sent_at_once() -> None:
    async def accept_one() -> int:
        no_delay: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def read_option(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            no_delay.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with bind_socket("127.0.0.1", 0) as sock:
            async with await asyncio.start_server(read_option, sock=sock):
                _, writer = await asyncio.open_connection(*sock.getsockname())
                option = await no_delay
                writer.close()
        return option

    assert asyncio.run(accept_one()) == 1


def test_an_address_that_cannot_be_had_is_named() -> None:
    with bind_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"127\.0\.0\.1 port {port}: Address already in use"):
            bind_socket("127.0.0.1", port)
