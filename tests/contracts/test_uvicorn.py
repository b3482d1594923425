"""What server/connections relies on in uvicorn's protocol, pinned. A change here says what broke."""

import inspect

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import Server


def test_a_protocol_counts_itself_and_knows_its_request() -> None:
    made = inspect.getsource(H11Protocol.connection_made)
    assert "self.connections.add(self)" in made
    assert "self.connections.discard(self)" in inspect.getsource(H11Protocol.connection_lost)
    assert {"self.cycle:", "self.limit_concurrency =", "self.loop =", "self.transport:"} <= {
        " ".join(line.split()[: 1 if ":" in line.split()[0] else 2])
        for line in inspect.getsource(H11Protocol.__init__).splitlines()
        if line.strip().startswith("self.")
    }
    assert "self.response_complete = False" in inspect.getsource(RequestResponseCycle.__init__)


def test_it_is_full_before_the_last_place_is_taken() -> None:
    handled = inspect.getsource(H11Protocol.handle_events)
    assert "len(self.connections) >= self.limit_concurrency" in handled  # itself counted


def test_a_server_without_sockets_starts_its_application_and_ends_what_listens() -> None:
    startup = inspect.getsource(Server.startup)
    assert "if sockets is not None:" in startup
    assert "self.servers: list[asyncio.base_events.Server] = []" in startup
    assert "app_state=self.lifespan.state" in startup
    shutdown = inspect.getsource(Server.shutdown)
    assert "server.close()" in shutdown
    assert "await server.wait_closed()" in inspect.getsource(Server._wait_tasks_to_complete)
    assert "await self.on_tick(counter)" in inspect.getsource(Server.main_loop)


def test_the_end_of_each_answer_is_told() -> None:
    assert "on_response=self.on_response_complete" in inspect.getsource(H11Protocol.handle_events)
    source = inspect.getsource(RequestResponseCycle.send)
    assert source.index("self.response_complete = True") < source.index("self.on_response()")
