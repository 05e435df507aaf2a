"""What crosses hosts between ranks: read on the wire without the tunnel of docs/security.md, and not with it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.hosts import Host, hosts

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parent.parent / "docs" / "security.md"
PLANTED = "The weights of this model cross a wire."
BYTES = 1_000_000  # so many that the text is found whole within a packet, wherever packets end
#: All hosts share the disk of this machine, but keys and the sockets of wireguard-go are each host's own.
OWN_FOLDERS = ("/etc/wireguard", "/var/run/wireguard")
SECONDS = 60.0
WIREGUARD_PORT = 51820  # as the page sets it

#: rank, folder, text, bytes: rank 0 broadcasts the text, time after time, then both sum it.
RANK = """
import sys, torch, torch.distributed as dist
rank, folder, text = int(sys.argv[1]), sys.argv[2], sys.argv[3].encode()
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(folder + "/meeting", 2), rank=rank, world_size=2)
planted = torch.tensor(list(text), dtype=torch.uint8).repeat(int(sys.argv[4]) // len(text))
got = planted.clone() if rank == 0 else torch.zeros_like(planted)
dist.broadcast(got, 0)
assert torch.equal(got, planted)
dist.all_reduce(got.mul_(1 - rank))
assert torch.equal(got, planted)
dist.destroy_process_group()
"""

#: interface, file: writes every packet of the interface after its length, once "ready" is printed, until it is ended.
CAPTURE = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as wire, open(sys.argv[2], "wb", 0) as out:
    wire.setsockopt(socket.SOL_SOCKET, 33, 64 * 1024 * 1024)  # SO_RCVBUFFORCE of asm-generic/socket.h
    wire.bind((sys.argv[1], 0))
    print("ready", flush=True)
    while True:
        packet = wire.recv(1 << 17)
        out.write(len(packet).to_bytes(4, "big") + packet)
"""

JOB = """
[model]
family = "llama"
layers = 2
hidden = 64
heads = 4
kv_heads = 2
ffn = 128
vocab = 512

[data]
source = "texts.txt"
seq_len = 32
tokenizer = "bytes"

[train]
steps = 3
lr = 1e-3
global_batch = 8
precision = "fp32"
"""

#: address: listens there as gloo does, and prints its port.
LISTEN = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        server.accept()[0].close()
"""

#: address, port: ends with 0 where it is answered within two seconds, with 3 where it is not.
CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).close()
except TimeoutError:
    sys.exit(3)
"""


def commands() -> tuple[str, str]:
    """The commands of the page: those that make the keys, and those for every host."""
    make_keys, on_every_host = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return make_keys, on_every_host


def interface() -> str:
    """The interface that the page tells a job to use."""
    return re.findall(r"`--interface (\w+)`", PAGE.read_text(encoding="utf-8"))[0]


def tunnel(members: Sequence[Host], folder: Path) -> list[str]:
    """Joins the hosts by the commands of the page; their addresses in the tunnel."""
    for command in ("wg-quick", "wireguard-go", "nft"):
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not installed: tests/services.sh installs it")
    (folder / "hosts.txt").write_text("".join(f"{host.name} {host.address}\n" for host in members))
    make_keys, on_every_host = commands()
    subprocess.run(["bash", "-ec", make_keys], cwd=folder, check=True)
    addresses = []
    for host in members:
        for own in OWN_FOLDERS:
            os.makedirs(own, exist_ok=True)
            host.hide(own)
        given = folder / "keys" / host.name / "mesh.conf"
        assert host.run(["install", "-m", "600", str(given), "/etc/wireguard/mesh.conf"]).returncode == 0
        done = host.run(["bash", "-ec", on_every_host])
        assert done.returncode == 0, done.stderr
        addresses += re.findall(r"^Address = ([\d.]+)", given.read_text(), re.M)
    return addresses


@contextlib.contextmanager
def captured(host: Host, path: Path) -> Iterator[None]:
    """Everything that passes the cable of a host, written to a file."""
    command = [sys.executable, "-c", CAPTURE, host.interface, path]
    with host.start(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        try:
            yield
            time.sleep(0.5)  # for the last packets to be read
        finally:
            process.kill()


def cross(members: Sequence[Host], folder: Path, over: str) -> bytes:
    """What the cable of the first host carried while two ranks passed the planted text over an interface."""
    folder.mkdir()
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": over, "OMP_NUM_THREADS": "1"}
    with captured(members[0], folder / "packets"):
        ranks = [
            host.start([sys.executable, "-c", RANK, rank, folder, PLANTED, BYTES], env=environment)
            for rank, host in enumerate(members)
        ]
        assert [rank.wait(SECONDS) for rank in ranks] == [0, 0]
    return (folder / "packets").read_bytes()


def test_what_ranks_pass_is_read_on_the_wire_without_the_tunnel(tmp_path: Path) -> None:
    with hosts(2) as pair:
        assert PLANTED.encode() in cross(pair, tmp_path / "run", pair[0].interface)


def test_what_ranks_pass_is_not_read_on_the_wire_with_it(tmp_path: Path) -> None:
    with hosts(2) as pair:
        tunnel(pair, tmp_path)
        packets = cross(pair, tmp_path / "run", interface())
        assert len(packets) > 2 * BYTES  # the broadcast and the sum crossed this wire
        assert PLANTED[:8].encode() not in packets


def ports(packets: bytes) -> set[tuple[int, int]]:
    """(protocol, port) of each end of the TCP and UDP packets of a capture."""
    found, at = set(), 0
    while at < len(packets):
        size = int.from_bytes(packets[at : at + 4], "big")
        frame, at = packets[at + 4 : at + 4 + size], at + 4 + size
        if frame[12:14] == b"\x08\x00" and frame[23] in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
            first = 14 + 4 * (frame[14] & 15)
            found |= {(frame[23], int.from_bytes(frame[first + end : first + end + 2], "big")) for end in (0, 2)}
    return found


def test_a_run_whose_hub_is_in_the_tunnel_sends_nothing_past_it(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "texts.txt").write_text(PLANTED * 1000)
    with hosts(2) as pair:
        hub = f"launch.address={tunnel(pair, tmp_path)[0]}:7474"
        train = [sys.executable, "-m", "meshwright", "train", "job.toml", "launch.on=agents", hub, "cluster.devices=2"]
        agent = [sys.executable, "-m", "meshwright.launch.agent", "--run", "runs/job", "--devices", "1"]
        with captured(pair[0], tmp_path / "packets"):
            driver = pair[0].start(train, cwd=tmp_path)
            agents = [host.start(agent, cwd=tmp_path) for host in pair]
            assert [process.wait(2 * SECONDS) for process in (driver, *agents)] == [0, 0, 0]
    assert ports((tmp_path / "packets").read_bytes()) == {(socket.IPPROTO_UDP, WIREGUARD_PORT)}


def test_a_stranger_is_not_answered_at_the_addresses_of_the_tunnel(tmp_path: Path) -> None:
    with hosts(3) as (first, second, stranger):
        address = tunnel((first, second), tmp_path)[0]
        server = first.start([sys.executable, "-c", LISTEN, address], stdout=subprocess.PIPE, text=True)
        connect = [sys.executable, "-c", CONNECT, address, server.stdout.readline().strip()]
        stranger.run(["ip", "route", "add", f"{address}/32", "via", first.address])
        assert second.run(connect).returncode == 0
        assert first.run(connect).returncode == 0
        assert stranger.run(connect).returncode == 3
        # it is the rule of the page that keeps them out
        assert first.run(["nft", "delete", "table", "inet", "mesh"]).returncode == 0
        assert stranger.run(connect).returncode == 0
        server.stdout.close()
