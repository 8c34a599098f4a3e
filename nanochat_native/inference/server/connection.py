"""HTTP connections with timeouts for slow clients, and errors in OpenAI's format for requests that are not HTTP."""

import asyncio
import json
import socket
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

LINGER_SECONDS = 1.0  # after an error that closes the connection, so that the client can read it


def configured(app: Any, *, timeout: int, grace: int, log_level: str = "warning") -> uvicorn.Config:
    """Return uvicorn's settings for an application.

    Args:
        timeout: Seconds that a Connection waits for its client.
        grace: Seconds that running requests have when the server shuts down.
    """
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        timeout_keep_alive=timeout,
        timeout_graceful_shutdown=grace,
        log_level=log_level,
        access_log=False,
        server_header=False,
    )


class InterruptibleServer(uvicorn.Server):
    """uvicorn's server, which a second SIGINT ends at once.

    uvicorn waits for `asyncio.Server.wait_closed` even then. From Python 3.12 on, that waits for the open connections.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        forced = asyncio.ensure_future(self._abort_connections_when_forced())
        try:
            await super().shutdown(sockets)
        finally:
            forced.cancel()

    async def _abort_connections_when_forced(self) -> None:
        while not self.force_exit:
            await asyncio.sleep(0.1)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol. A request that is not HTTP/1.1 gets the answer 400.

    A client has timeout_keep_alive seconds for each of the following, even if it keeps sending a little:

    - to send the head of a request, after the connection opens or the last answer ends. Part of a head gets the answer
      408; without any data the connection is closed without an answer;
    - to send the rest of a body whose answer has already been sent;
    - to read data that exceeds the buffers.

    The application limits the time for a body that it waits for. A client that closes its sending side counts as
    disconnected.
    """

    _deadline: asyncio.TimerHandle | None = None
    _paused = False  # the client does not read
    _refused = False  # further data is ignored

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
            self._watch()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, "the request is not valid HTTP/1.1, or its headers are too long")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop()  # the next request has its own time
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._paused = True
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._paused = False
        self._watch()

    @property
    def _waits(self) -> bool:
        """Whether the server waits for the client."""
        if self._paused or self.conn.their_state is h11.IDLE:
            return True
        return self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete

    def _watch(self) -> None:
        if not self._waits:
            self._stop()
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self.timeout_keep_alive, self._expire)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        if self._paused:
            self.transport.abort()  # close() would wait for the client
        elif not self.transport.is_closing():
            head, _ = self.conn.trailing_data
            if self.conn.their_state is not h11.IDLE or not head:
                self.transport.close()
                return
            message = f"the request's headers did not arrive within {self.timeout_keep_alive:g} s"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, message)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer, unless the application has already begun to, and close the connection."""
        self._stop()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun
            self.transport.close()
            return
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = json.dumps({"error": error}).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        events = (
            h11.Response(status_code=status, headers=headers, reason=status.phrase.encode()),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        # Closing at once would reset the connection if more data arrives, and the client would lose the answer.
        self._refused = True
        self.transport.write_eof()
        self._deadline = self.loop.call_later(LINGER_SECONDS, self.transport.close)
