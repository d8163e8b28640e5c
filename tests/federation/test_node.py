"""A data owner's node: the owner's file, base model and version hold, whatever the server sends, and errors tell nothing."""

import io
import json
import re
import socket
import ssl
import sys
import threading
import tomllib
import zipfile
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tomli_w
import torch
from arithmetic import client_app
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.supercore.fab import Fab
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig, Section
from fedtune.errors import ClientError, MissingError, UsageError
from fedtune.federation import client
from fedtune.federation.client_state import ClientState
from fedtune.federation.flower.credentials import check_ca, check_key, check_superlink
from fedtune.federation.node.policy import NODE_KEY, NodeSettings, Term, config_on_node, privacy_terms
from fedtune.federation.node.run import answer
from fedtune.federation.privacy import Accountant
from fedtune.federation.workspace import NodeWorkspace, workspace_of_client
from fedtune.models.adapter import initial_tensors
from fedtune.protocol.arrays import encode

PROJECT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hunter2"


def rows(folder: Path, count: int = 5, name: str = "patients.jsonl", **columns: str) -> Path:
    """Write a data file of `count` rows with the tiny challenge's columns, or with `columns`."""
    row = columns or {"instruction": "Say it.", "input": "Question: where?", "output": "A"}
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
    return path


@pytest.fixture
def own(tmp_path: Path) -> NodeSettings:
    """An owner with five rows and the built-in base model."""
    return NodeSettings(data=str(rows(tmp_path)), base="builtin:tiny")


def config_json(*changes: str) -> str:
    small = ["training.max_steps=1", "training.batch_size=2"]
    return load_config(challenge="tiny", settings=[*small, *changes]).config.model_dump_json()


def context(text: str | None = None, version: str | None = None, **node: str) -> Context:
    run_config: dict[str, Any] = {"fedtune-config": config_json() if text is None else text}
    if version is not None:
        run_config["fedtune-version"] = version
    return Context(
        run_id=1, node_id=2, node_config={"partition-id": 3, **node}, state=RecordDict(), run_config=run_config
    )


def bundle(clientapp: str = "fedtune.federation.client:app", **files: str) -> Fab:
    """A run's bundle whose pyproject names `clientapp`, with `files` in it."""
    table = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    table["tool"]["flwr"]["app"]["components"]["clientapp"] = clientapp
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("pyproject.toml", tomli_w.dumps(table))
        for name, text in files.items():
            archive.writestr(name, text)
    return Fab(hash_str="", content=content.getvalue(), verifications={})


def question(kind: str = MessageType.QUERY, content: RecordDict | None = None) -> Message:
    message = Message(content or RecordDict(), 2, kind)
    message.metadata.__dict__["_message_id"] = "asked"
    return message


def refusal(own: NodeSettings, text: str, version: str = "") -> str:
    with pytest.raises(ClientError) as caught:
        config_on_node(text, version, own)
    return str(caught.value)


# What the server says about places and code


def test_paths_of_the_server_are_not_looked_at(own: NodeSettings, flower_identity: None) -> None:
    text = config_json(
        "data.source=/etc/passwd", "data.partitioner=natural", "data.partition_by=clinic", "data.split=test"
    )
    config = config_on_node(text, "", own)
    assert config.data.source == own.data
    assert (config.data.partitioner, config.data.partition_by, config.data.split) == ("iid", None, "train")
    reply = answer(question(), context(text), bundle(), own)
    # All of the file is this client's share, whatever number it has and however many clients there are.
    assert dict(reply.content.metric_records["metrics"]) == {"partition-id": 3, "rows": 5}


@pytest.mark.parametrize("asked", ["/etc", "~/models/x", "./models", "a/b/c"])
def test_a_base_model_given_as_a_path_is_the_owners(own: NodeSettings, asked: str) -> None:
    assert config_on_node(config_json(f"model.base={asked}"), "", own).model.base == "builtin:tiny"


def test_an_owners_folder_stands_for_the_named_base(own: NodeSettings, tmp_path: Path) -> None:
    config = config_on_node(config_json("model.base=owner/llama"), "", replace(own, base=str(tmp_path)))
    assert config.model.base == str(tmp_path)


def test_another_base_model_or_revision_is_refused(own: NodeSettings) -> None:
    assert "owner/other" in refusal(own, config_json("model.base=owner/other"))
    named = replace(own, base="owner/llama", revision="v1")
    assert "revision v2" in refusal(named, config_json("model.base=owner/llama", "model.revision=v2"))
    assert config_on_node(config_json("model.base=owner/llama"), "", named).model.revision == "v1"


def test_the_base_models_own_code_runs_only_at_the_owners_commit(own: NodeSettings) -> None:
    asked = ["model.base=owner/llama", f"model.revision={COMMIT}", "model.trust_remote_code=true"]
    named = replace(own, base="owner/llama")
    allowed = replace(named, revision=COMMIT, trust_remote_code=True)
    assert "does not run" in refusal(named, config_json(*asked))
    assert "does not run" in refusal(replace(named, revision=COMMIT), config_json(*asked))
    # Leave without a commit is no leave.
    assert "does not run" in refusal(replace(named, trust_remote_code=True), config_json(*asked))
    assert config_on_node(config_json(*asked), "", allowed).model.trust_remote_code
    assert not config_on_node(config_json(*asked[:2]), "", allowed).model.trust_remote_code


def test_every_free_text_of_the_config_was_thought_of() -> None:
    """A new text in the config might name a place or code: decide in `config_on_node`, then add it here."""
    overridden = {"model.base", "model.revision", "data.source", "data.revision", "data.split", "data.partition_by"}
    templates = {"data.instruction", "data.response"}  # of the owner's own file only
    unread = {
        "challenge",
        "recipe",
        "federation.ray_address",
        "federation.superlink",
        "federation.superlink_ca",
    }  # by nobody on a node
    names = {"adapter.targets", "adapter.modules_to_save"}  # module names that PEFT compares with the model's
    assert set(free_texts(FedTuneConfig, "")) == overridden | templates | unread | names


def free_texts(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        for member in [field.annotation, *inner(field.annotation)]:
            if isinstance(member, type) and issubclass(member, Section):
                yield from free_texts(member, f"{prefix}{name}.")
            elif member is str or (isinstance(member, type) and issubclass(member, Path)):
                yield prefix + name


def inner(annotation: Any) -> Iterator[Any]:
    for member in get_args(annotation):
        yield member
        yield from inner(member)


@settings(max_examples=30, deadline=None)
@given(st.text() | st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_whatever_is_no_config_is_refused_as_such(text: str) -> None:
    assert "config" in refusal(NodeSettings(data="/x", base="builtin:tiny"), text)


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1), st.none() | st.text())
def test_no_base_but_the_owners_is_ever_taken(base: str, revision: str | None) -> None:
    table = json.loads(config_json())
    table["model"] |= {"base": base, "revision": revision}
    try:
        config = config_on_node(json.dumps(table), "", NodeSettings(data="/own.jsonl", base="owner/llama"))
    except ClientError:
        return
    assert (config.model.base, config.data.source) == ("owner/llama", "/own.jsonl")


# Versions, columns, limits


def test_another_version_of_fedtune_is_refused_before_its_config_is_read(own: NodeSettings) -> None:
    from importlib.metadata import version

    assert "fedtune 99.0" in refusal(own, "{}", "99.0")
    config_on_node(config_json(), version("fedtune"), own)
    with pytest.raises(ClientError, match=r"fedtune 99\.0"):
        workspace_of_client(context(version="99.0", **{NODE_KEY: own.to_json()}))


def test_columns_that_do_not_fit_are_refused_without_naming_the_files(tmp_path: Path, flower_identity: None) -> None:
    other = NodeSettings(data=str(rows(tmp_path, diagnosis=SECRET, answer="A")), base="builtin:tiny")
    reply = answer(question(), context(), bundle(), other)
    assert reply.error.reason == "The run's templates name columns that this node's data does not have."
    fitting = replace(other, instruction="{diagnosis}?", response="{answer}")
    reply = answer(question(), context(), bundle(), fitting)
    assert reply.content.metric_records["metrics"]["rows"] == 5


def test_data_with_nothing_to_learn_from_is_refused(tmp_path: Path, flower_identity: None) -> None:
    empty = rows(tmp_path, instruction="Say it.", input="x", output="")
    reply = answer(question(), context(), bundle(), NodeSettings(data=str(empty), base="builtin:tiny"))
    assert reply.error.reason == "No row of this node's data has anything to learn from."


def test_the_owners_time_limit_holds(own: NodeSettings) -> None:
    asked = config_json("federation.client_timeout_s=600.0")
    assert config_on_node(asked, "", own).federation.client_timeout_s == 600
    assert config_on_node(asked, "", replace(own, max_seconds=30)).federation.client_timeout_s == 30
    assert config_on_node(asked, "", replace(own, max_seconds=900)).federation.client_timeout_s == 600


@pytest.mark.parametrize(
    ("term", "asked", "said"),
    [
        (
            Term("privacy.mode", "only", "local"),
            "privacy.mode=central",
            "mode is central; .* with privacy.mode only local",
        ),
        (
            Term("privacy.epsilon", "at most", 8.0),
            "privacy.epsilon=8.5",
            "epsilon is 8.5; .* privacy.epsilon at most 8.0",
        ),
        (Term("privacy.noise_multiplier", "at least", 2.0), "privacy.noise_multiplier=1.5", "is 1.5; .* at least 2.0"),
        (Term("training.batch_size", "at most", 1), "training.batch_size=2", "is 2; .* training.batch_size at most 1"),
    ],
)
def test_a_run_against_the_owners_terms_is_refused(own: NodeSettings, term: Term, asked: str, said: str) -> None:
    settings = NodeSettings.from_json(replace(own, state="/state", terms=(term,)).to_json())
    assert settings.terms == (term,)
    assert re.search(said, refusal(settings, config_json(asked)))
    config_on_node(config_json(f"{term.key}={term.value}"), "", settings)  # what was agreed on


def test_a_stricter_privacy_than_agreed_is_taken(own: NodeSettings) -> None:
    asked = config_json(
        "privacy.mode=local", "privacy.epsilon=1.0", "privacy.noise_multiplier=50", "privacy.delta=1e-9"
    )
    agreed = load_config(settings=["privacy.mode=local", "privacy.noise_multiplier=5"])
    terms = privacy_terms(agreed.config, agreed.origins)
    assert [str(term) for term in terms] == [
        "privacy.mode only local",
        "privacy.epsilon at most 8.0",
        "privacy.delta at most 1e-05",
        "privacy.noise_multiplier at least 5.0",
    ]
    assert config_on_node(asked, "", replace(own, state="/state", terms=terms)).privacy.epsilon == 1
    assert (
        privacy_terms(load_config(settings=["privacy.mode=none", "privacy.epsilon=3.0"]).config, ["privacy.epsilon"])
        == ()
    )


def test_a_client_keeps_to_its_budget_whatever_the_server_asks(
    own: NodeSettings, flower_identity: None, tmp_path: Path
) -> None:
    """A server that never stops, repeats rounds with other adapters, or makes up round numbers gets no more than the budget."""
    own = replace(own, state=str(tmp_path / "state"))
    text = config_json(
        "privacy.mode=local", "privacy.noise_multiplier=5.0", "privacy.epsilon=4.0", "federation.rounds=2"
    )
    budget = 0
    while Accountant(load_config(settings=["privacy.noise_multiplier=5.0"]).config).epsilon_after(budget + 1) <= 4:
        budget += 1
    assert budget >= 3
    workspace = NodeWorkspace(config_on_node(text, "", own))
    first = initial_tensors(workspace.adapted, seed=1)
    node = context(text)

    def ask(server_round: int, tensors: dict[str, torch.Tensor]) -> Message:
        orders = ConfigRecord({"server-round": server_round, "learning-rate": 1e-3})
        content = RecordDict({"arrays": encode(tensors, "float32"), "config": orders})
        return answer(question(MessageType.TRAIN, content), node, bundle(), own)

    assert same_arrays(ask(2, first), ask(2, first))  # what a crash undid: the same bits, no release
    for number in range(1, budget):
        other = {name: tensor + 1e-4 * number for name, tensor in first.items()}
        assert not ask((1, 99)[number % 2], other).has_error()
    refused = ask(1, {name: tensor - 1e-4 for name, tensor in first.items()})
    assert re.fullmatch(
        r"Another reply would bring this client's epsilon to 4\.\d+, above its budget of 4\.",
        refused.error.reason or "",
    )
    assert not node.state.array_records


def same_arrays(ours: Message, theirs: Message) -> bool:
    one, other = (message.content.array_records["arrays"] for message in (ours, theirs))
    return all(np.array_equal(one[name].numpy(), other[name].numpy()) for name in one)


# What leaves


def test_a_round_on_a_node_gives_the_adapter_and_named_numbers(own: NodeSettings, flower_identity: None) -> None:
    workspace = NodeWorkspace(config_on_node(config_json(), "", own))
    tensors = initial_tensors(workspace.adapted, seed=1)
    orders = ConfigRecord({"server-round": 1, "learning-rate": 1e-3})
    content = RecordDict({"arrays": encode(tensors, "float32"), "config": orders})
    reply = answer(question(MessageType.TRAIN, content), context(), bundle(), own)
    assert set(reply.content) == {"arrays", "metrics"}
    assert set(reply.content.array_records["arrays"]) == set(tensors)
    numbers = reply.content.metric_records["metrics"]
    assert set(numbers) == {
        *("server-round", "num-examples", "train-loss", "losses", "rows", "tokens", "response-tokens", "seconds")
    }
    assert numbers["num-examples"] == 5


def planted(own: NodeSettings, tmp_path: Path, where: str) -> NodeSettings:
    """Settings with a secret in the name of something that cannot be loaded."""
    match where:
        case "no such file":
            return replace(own, data=str(tmp_path / f"{SECRET}.jsonl"))
        case "malformed row":
            path = tmp_path / f"{SECRET}.jsonl"
            path.write_text(f'{{"instruction": "{SECRET}"')
            return replace(own, data=str(path))
        case "no such base":
            return replace(own, base=str(tmp_path / SECRET))
        case _:
            folder = tmp_path / SECRET
            folder.mkdir()
            (folder / "config.json").write_text(f'{{"model_type": "{SECRET}"}}')
            (folder / "model.safetensors").write_bytes(SECRET.encode())
            return replace(own, base=str(folder))


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("no such file", "MissingError"),
        ("malformed row", "UsageError"),
        ("no such base", "MissingError"),
        ("broken base", "ConfigError"),
    ],
)
def test_an_error_while_loading_leaves_as_a_bare_name(
    own: NodeSettings,
    tmp_path: Path,
    where: str,
    said: str,
    flower_identity: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reply = answer(question(), context(), bundle(), planted(own, tmp_path, where))
    assert (reply.error.code, reply.error.reason) == (2, said)
    # The owner is told everything.
    assert SECRET in caplog.text


def test_an_error_while_training_leaves_as_a_bare_name(
    own: NodeSettings, flower_identity: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The app raises RuntimeError("secret: hunter2 in /home/…"); Flower's own process would send that text on."""
    monkeypatch.setattr(client, "app", client_app(tamper=lambda *_: None))
    from arithmetic import SHAPES

    arrays = encode({name: torch.zeros(shape) for name, shape in SHAPES.items()}, "float32")
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
    reply = answer(question(MessageType.TRAIN, content), context(), bundle(), own)
    assert reply.error.reason == "RuntimeError"
    assert SECRET in caplog.text


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (MessageType.EVALUATE, "ValueError"),
        ("train.steal", "ValueError"),
        (MessageType.TRAIN, "The server's message cannot be read"),
    ],
)
def test_messages_of_no_known_kind_or_content_are_errors(
    own: NodeSettings, kind: str, said: str, flower_identity: None
) -> None:
    content = RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord({"server-round": 1})})
    reply = answer(question(kind, content), context(), bundle(), own)
    assert reply.error.reason.startswith(said)


def test_a_bundles_code_is_neither_unpacked_nor_run(
    own: NodeSettings, flower_identity: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    steal = {"fedtune/__init__.py": "raise SystemExit", "fedtune/federation/client.py": "raise SystemExit"}
    reply = answer(question(), context(), bundle(**steal), own)
    assert reply.content.metric_records["metrics"]["rows"] == 5
    assert not (tmp_path / "home").exists()
    reply = answer(question(), context(), bundle("stolen.client:app", **{"stolen/client.py": "raise SystemExit"}), own)
    assert reply.error.reason.startswith("The run's bundle is of another app than fedtune")
    assert "stolen" not in sys.modules


def test_the_settings_of_a_node_are_not_the_servers_to_write(own: NodeSettings) -> None:
    """They are looked for in the node's config only; in the run's they mean nothing."""
    asked = context(**{NODE_KEY: own.to_json()})
    asked.run_config[NODE_KEY] = NodeSettings(data="/etc/passwd", base="/").to_json()
    assert workspace_of_client(asked).config.data.source == own.data
    assert NodeSettings.from_json(own.to_json()) == own


def test_what_is_kept_between_rounds_lies_where_the_owner_says(own: NodeSettings, tmp_path: Path) -> None:
    asked = context(**{NODE_KEY: own.to_json()})
    asked.run_config |= {"run-dir": "/nowhere", "run-name": "../../nowhere"}
    assert ClientState(asked, 3).folder is None
    asked.node_config[NODE_KEY] = replace(own, state=str(tmp_path)).to_json()
    folder = ClientState(asked, 3).folder
    assert folder is not None
    assert folder.resolve().parent == tmp_path


def test_a_node_asks_soon_while_rounds_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's loop waits 3 s whenever it is told that there was nothing; after a message it is not told so for a while."""
    from fedtune.federation.node import process as supernode_child

    monkeypatch.setattr(supernode_child, "_POLL_S", 0.001)
    found = iter([None, 7, None, None, 7, None, None, None])
    pull = supernode_child.prompt(lambda **_: next(found, None))
    assert pull() is None  # nothing has come yet: as often as Flower asks
    assert pull() == 7
    assert pull() == 7
    assert next(found) is None
    monkeypatch.setattr(supernode_child, "_BUSY_S", 0.0)
    assert pull() is None


# Keys, certificates, addresses


def key_file(path: Path, key: Any = None) -> Path:
    key = key or ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return path


def locked_key_file(path: Path) -> Path:
    """Write a key whose header says that it is encrypted, in PROTOCOL.key's format: lengths before texts."""
    first, *body, last = key_file(path).read_text().splitlines()
    plain = b"".join(len(text).to_bytes(4, "big") + text for text in (b"none", b"none", b""))
    options = (16).to_bytes(4, "big") + bytes(16) + (16).to_bytes(4, "big")  # salt and rounds
    locked = b"".join(len(text).to_bytes(4, "big") + text for text in (b"aes256-ctr", b"bcrypt", options))
    content = b64decode("".join(body)).replace(plain, locked, 1)
    path.write_text("\n".join([first, b64encode(content).decode(), last, ""]))
    return path


def certificate(folder: Path, *, starts: timedelta = timedelta(), days: int = 1, name: str = "ca") -> tuple[Path, Path]:
    """Write a self-signed certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin = datetime.now(UTC) - timedelta(days=10) + starts
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=10 + days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    crt, private = folder / f"{name}.crt", folder / f"{name}.key"
    crt.write_bytes(built.public_bytes(Encoding.PEM))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return crt, private


def test_a_usable_key_is_taken(tmp_path: Path) -> None:
    check_key(key_file(tmp_path / "key"))


def test_what_is_no_usable_key_is_said(tmp_path: Path) -> None:
    public = tmp_path / "key.pub"
    key = ec.generate_private_key(ec.SECP384R1())
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    with pytest.raises(UsageError, match="is a public key") as caught:
        check_key(public)
    assert f"--key {tmp_path / 'key'}" in caught.value.hint
    with pytest.raises(UsageError, match="passphrase"):
        check_key(locked_key_file(tmp_path / "locked"))
    with pytest.raises(UsageError, match="elliptic curve"):
        check_key(key_file(tmp_path / "ed", ed25519.Ed25519PrivateKey.generate()))
    with pytest.raises(UsageError, match="no private key in OpenSSH"):
        check_key(certificate(tmp_path)[1])
    with pytest.raises(UsageError, match="cannot be read"):
        check_key(tmp_path)
    with pytest.raises(MissingError, match="no key file"):
        check_key(tmp_path / "none")


def test_certificates_are_looked_at_before_they_are_used(tmp_path: Path) -> None:
    check_ca(certificate(tmp_path)[0])
    with pytest.raises(UsageError, match="expired on"):
        check_ca(certificate(tmp_path, days=-2, name="old")[0])
    with pytest.raises(UsageError, match="valid only from"):
        check_ca(certificate(tmp_path, starts=timedelta(days=20), name="early")[0])
    with pytest.raises(UsageError, match="no certificate"):
        check_ca(certificate(tmp_path)[1])
    with pytest.raises(MissingError, match="no certificate file"):
        check_ca(tmp_path / "none")


@pytest.fixture
def listen() -> Iterator[Callable[[ssl.SSLContext | None], str]]:
    """Starts servers on loopback, each answering any request with "404", with or without TLS; returns their addresses."""
    listeners = []

    def start(tls: ssl.SSLContext | None) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with suppress(OSError), tls.wrap_socket(connection, server_side=True) if tls else connection as talk:
                    talk.recv(1000)
                    talk.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def test_a_superlink_is_who_the_certificate_says(
    tmp_path: Path, listen: Callable[[ssl.SSLContext | None], str]
) -> None:
    crt, private = certificate(tmp_path)
    stranger, _ = certificate(tmp_path, name="stranger")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(crt, private)
    secure, plain = listen(tls), listen(None)
    assert check_superlink(secure, crt, insecure=False)
    assert check_superlink(plain, None, insecure=True)
    with pytest.raises(UsageError, match=r"stranger\.crt vouches for"):
        check_superlink(secure, stranger, insecure=False)
    with pytest.raises(UsageError, match="not the one that a certificate authority"):
        check_superlink(secure, None, insecure=False)
    with pytest.raises(UsageError, match="does not speak TLS"):
        check_superlink(plain, crt, insecure=False)
    with pytest.raises(UsageError, match="speaks TLS") as caught:
        check_superlink(secure, None, insecure=True)
    assert "--ca" in caught.value.hint


def test_a_superlink_may_come_later_but_needs_an_address(free_port: int) -> None:
    assert not check_superlink(f"127.0.0.1:{free_port}", None, insecure=True)
    for address in ("localhost", "http://localhost:8000", "localhost:port", ""):
        with pytest.raises(UsageError, match="no address of a SuperLink"):
            check_superlink(address, None, insecure=True)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
