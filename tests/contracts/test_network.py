"""The fixture that blocks the network really blocks it, and this machine stays reachable."""

from __future__ import annotations

import socket
import urllib.request

import pytest


def test_remote_addresses_are_refused(blocked_network: list[str]) -> None:
    with socket.socket() as client, pytest.raises(ConnectionRefusedError, match="blocked"):
        client.connect(("192.0.2.1", 443))
    with socket.socket() as client, pytest.raises(ConnectionRefusedError, match="blocked"):
        client.connect_ex(("192.0.2.1", 443))
    assert len(blocked_network) == 2


def test_names_are_not_looked_up(blocked_network: list[str]) -> None:
    with pytest.raises(OSError, match="blocked"):
        urllib.request.urlopen("http://example.invalid/", timeout=1)
    assert any("example.invalid" in address for address in blocked_network)


def test_this_machine_stays_reachable(blocked_network: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
    assert blocked_network == []
