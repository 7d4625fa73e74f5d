"""``wsfed keygen`` and ``wsfed roster``: keys, and the list of who adds up with whom."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from wsfed.privacy.roster import Membership

__all__ = ["keygen", "membership_of", "roster"]


def keygen(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Where the private key goes; must not exist yet.")
    ],
) -> None:
    """Make a key to sign with: a worker's, or that of who signs rosters.

    Writes the private key, readable by its owner only, and prints the public one.
    """
    from cryptography.hazmat.primitives import serialization as form

    keys = _keys()
    key = keys.new_key()
    pem = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(pem)
    except OSError as error:
        _fail(f"{file}: {error.strerror or error}")
    typer.echo(keys.public_key(key))


def roster(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the signed roster goes.")],
    owner: Annotated[Path, typer.Option(help="Private key to sign with (wsfed keygen).")],
    member: Annotated[
        list[str], typer.Option(metavar="NAME=KEY", help="A worker and its public key; repeat.")
    ],
    id: Annotated[str, typer.Option(help="Of the list; default: the file's name.")] = "",
    epoch: Annotated[int, typer.Option(min=1, help="Grows with each change.")] = 1,
    min_members: Annotated[int, typer.Option(min=3, help="That have to be in a sum.")] = 3,
    max_colluders: Annotated[
        int, typer.Option(min=0, help="Members that may work together against others.")
    ] = 1,
    min_rows: Annotated[int, typer.Option(min=1, help="That a member trains on.")] = 32,
    bound: Annotated[float, typer.Option(help="L2 norm to which a change is clipped.")] = 1.0,
    noise: Annotated[
        float, typer.Option(min=0.0, help="Deviation of the noise in a sum, in units of bound.")
    ] = 0.0,
    max_weight: Annotated[int, typer.Option(min=1, help="Rows count up to so many.")] = 1_000_000,
    round_rate: Annotated[
        int, typer.Option(min=1, help="Rounds that a member takes part in, at most, in ...")
    ] = 1_000,
    rate_seconds: Annotated[int, typer.Option(min=1, help="... so many seconds.")] = 86_400,
    arch_hash: Annotated[
        str, typer.Option(metavar="HASH", help="Structure of the model; default: any.")
    ] = "",
) -> None:
    """Sign who may add up with whom, and the numbers below which nobody takes part.

    Prints the owner's public key, which workers are started with.
    """
    keys = _keys()
    pairs = [text.partition("=") for text in member]
    if any(not name or not key for name, _, key in pairs):
        raise typer.BadParameter("--member is NAME=KEY, with the key that wsfed keygen printed")
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"--member {max(names, key=names.count)} is given twice")
    try:
        made = keys.Roster(
            id or file.stem,
            epoch,
            {name: key for name, _, key in pairs},
            min_members,
            max_colluders,
            min_rows,
            bound,
            max_weight,
            noise,
            round_rate,
            rate_seconds,
            arch_hash,
        )
        key = read_key(owner)
        keys.save_roster(file, made.sign(key))
    except (OSError, ValueError) as error:
        _fail(str(error))
    typer.echo(keys.public_key(key))


def membership_of(
    name: str, file: Path, owner: str, key: Path, journal: Path | None, moves: int, alike: float
) -> Membership:
    """What a worker needs to be a member.

    Raises:
        ValueError: the roster is not signed by this owner, or has no such member; or a file is not
            what it has to be.
        OSError: a file cannot be read.
    """
    from wsfed.privacy.cohorts import CohortPolicy
    from wsfed.privacy.journal import Journal

    keys = _keys()
    pinned = keys.load_roster(file).check(owner)
    made: Membership = keys.Membership(
        name, read_key(key), pinned, Journal(journal), CohortPolicy(moves=moves), alike
    )
    return made


def read_key(file: Path) -> Ed25519PrivateKey:
    """A private key as ``wsfed keygen`` writes it.

    Raises:
        ValueError: the file holds none.
        OSError: it cannot be read.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(file.read_bytes(), None)
    except (TypeError, ValueError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{file} holds no key of wsfed keygen")
    return key


def _keys() -> Any:
    try:
        from wsfed.privacy import roster as keys
    except ImportError:
        _fail("cryptography is not installed: pip install 'wsfed[secagg]'")
    return keys


def _fail(text: str) -> NoReturn:
    typer.secho(f"wsfed: {text}", fg="red", err=True)
    raise typer.Exit(1)
