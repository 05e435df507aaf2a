"""Who may reach a hub: its secrets, one for each scope, its certificate, and the files that hold them (mode 0600).

RUN/hub/access.json    {join, read, act, certificate, key}     for the hub alone
RUN/hub/agents.json    {address, secret, certificate}          for agents: scope join
RUN/hub/people.json    {address, secret, certificate, socket}  for `stop`: scope act
RUN/hub/readers.json   {address, secret, certificate, socket}  for `status`: scope read
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from meshwright.errors import InputError, Problem
from meshwright.files import parse_json, read_capped, write_atomic
from meshwright.launch.messages import Dial

#: The name that the hub's certificate is for, whatever its address: clients know the certificate itself.
CERTIFICATE_NAME = "meshwright-hub"
CERTIFICATE_DAYS = 3650
SCOPES = ("join", "read", "act")
#: Scope -> the scopes whose secret opens it as well.
OPENED_BY: Mapping[str, tuple[str, ...]] = {"join": ("join",), "read": ("read", "act"), "act": ("act",)}
MAX_FILE_BYTES = 1 << 16
#: The folder of these files in a run folder, and their names.
HUB_FOLDER = "hub"
ACCESS, AGENTS, PEOPLE, READERS = "access.json", "agents.json", "people.json", "readers.json"


@dataclass(frozen=True)
class Access:
    """The secrets by scope; with a certificate and its key (PEM) where the hub listens on a network."""

    join: str
    read: str
    act: str
    certificate: str = ""
    key: str = ""

    def opens(self, scope: str, secret: str) -> bool:
        """Whether `secret` opens `scope`. Takes equally long for every wrong secret."""
        matches = [hmac.compare_digest(getattr(self, name).encode(), secret.encode()) for name in OPENED_BY[scope]]
        return any(matches)

    def rotated(self) -> Access:
        """The same certificate with new secrets."""
        return replace(self, **{scope: secrets.token_hex(32) for scope in SCOPES})


def new_access(*, network: bool) -> Access:
    """New secrets; for a `network` with a self-signed certificate, which the agents are given."""
    certificate, key = _certificate() if network else ("", "")
    join, read, act = (secrets.token_hex(32) for _ in SCOPES)
    return Access(join, read, act, certificate, key)


def _certificate() -> tuple[str, str]:
    """A self-signed certificate for CERTIFICATE_NAME and its key, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, CERTIFICATE_NAME)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks of hosts differ
        .not_valid_after(now + timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(CERTIFICATE_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode()


def write_secret(path: Path) -> None:
    """Writes a new secret into a file that only this user can read."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, secrets.token_hex(32).encode(), mode=0o600)


def write_private(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON that only this user can read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode(), mode=0o600)


def read_private(path: Path) -> dict[str, Any]:
    """JSON that `write_private` wrote. Raises InputError where others can read or write the file."""
    mode = os.stat(path).st_mode
    if stat.S_IMODE(mode) & 0o077:
        what = f"holds a secret, and others can read it (mode {stat.S_IMODE(mode):04o})"
        raise InputError(Problem(str(path), what, f"chmod 600 {path}"))
    content = parse_json(read_capped(path, MAX_FILE_BYTES, follow_links=True), str(path))
    if not isinstance(content, dict):
        raise InputError(Problem(str(path), "is not a JSON object"))
    return content


def read_access(path: Path) -> Access:
    """What `access.json` says. Raises InputError naming a key that is missing."""
    content = read_private(path)
    names = (*SCOPES, "certificate", "key")
    if missing := [name for name in names if not isinstance(content.get(name), str)]:
        raise InputError(Problem(f"{path}: {missing[0]}", "is missing or no text", f"needed: {', '.join(names)}"))
    return Access(*(content[name] for name in names))


def read_dial(path: Path) -> Dial:
    """What `agents.json`, `people.json` or `readers.json` says. Raises InputError naming a key that is missing."""
    content = read_private(path)
    names = ("address", "secret", "certificate")
    if missing := [name for name in names if not isinstance(content.get(name), str)]:
        raise InputError(Problem(f"{path}: {missing[0]}", "is missing or no text", f"needed: {', '.join(names)}"))
    return Dial(content["address"], content["secret"], content["certificate"])
