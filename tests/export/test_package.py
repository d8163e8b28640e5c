"""What may leave a run: named regular files without secrets, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import TOKEN

from fedtune.config.schema import DataConfig, FederationConfig, FedTuneConfig, ModelConfig
from fedtune.errors import MissingError, UsageError
from fedtune.export.package import is_hub_id, package, public_config, public_name, secret_in, strike

SECRETS = [
    TOKEN,
    "sk-" + "a1" * 12,
    "ghp_" + "Z9" * 18,
    "AKIA" + "A1B2C3D4E5F6G7H8",
    "-----BEGIN RSA PRIVATE KEY-----",
    "https://user:hunter2@host/data.csv",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_found_and_struck_out(secret: str) -> None:
    text = f"before {secret} after"
    assert secret_in(text)
    assert secret not in strike(text)
    assert not secret_in(strike(text))
    with pytest.raises(UsageError, match=r"notes\.txt holds what looks like a secret") as caught:
        package({"notes.txt": text})
    assert secret not in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.text() | st.sampled_from(SECRETS), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_striking_leaves_json_json(value: object) -> None:
    assert not secret_in(strike(json.dumps(value)))
    json.loads(strike(json.dumps(value)))


def test_ordinary_text_is_no_secret() -> None:
    for text in (
        "https://arxiv.org/abs/1602.05629",
        "hf_hub_download",
        "task-specific",
        "http://host:80/a@b",
        "a" * 64,
    ):
        assert not secret_in(text)


def test_a_package_names_every_file(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"12345")
    made = package({"b/weights.bin": tmp_path / "weights.bin", "a.txt": "ä"})
    assert made.digests() == {
        "a.txt": hashlib.sha256("ä".encode()).hexdigest(),
        "b/weights.bin": hashlib.sha256(b"12345").hexdigest(),
    }
    assert made.sizes() == {"a.txt": 2, "b/weights.bin": 5, "manifest.json": len(made.manifest())}
    assert made.text("a.txt") == "ä"
    made.write(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == made.digests()
    assert (tmp_path / "out" / "b" / "weights.bin").read_bytes() == b"12345"


def test_links_and_folders_do_not_leave(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    for name in ("link", "broken", "", "missing"):
        with pytest.raises(UsageError, match="is a link or no regular file"):
            package({"file": tmp_path / name})


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "./x", "a//b", "a/"])
def test_names_stay_inside(name: str) -> None:
    with pytest.raises(ValueError, match="no name inside a package"):
        package({name: "x"})


def test_only_an_exports_own_folder_is_replaced(tmp_path: Path) -> None:
    """A folder with a manifest.json of another kind, or with a file that the user added, is not."""
    made, out = package({"a.txt": "1", "b/c.txt": "2"}), tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    made.write(out)
    package({"a.txt": "3"}).write(out)
    assert {path.name for path in out.iterdir()} == {"a.txt", "manifest.json"}
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else"):
        made.write(out)
    assert (out / "mine.txt").read_text() == "mine"
    for content in ('{"name": "an extension", "version": 3}', "[1]", "x"):
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "manifest.json").write_text(content)
        (other / "work.py").write_text("work")
        with pytest.raises(UsageError, match="holds something else"):
            made.write(other)
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "file").write_text("x")
    for name in ("link", "file", "file/below"):
        with pytest.raises((UsageError, MissingError), match=r"holds something else|cannot be made"):
            made.write(tmp_path / name)


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("owner/name", "mistralai/Mistral-7B-v0.3"):
        assert is_hub_id(name)
    for name in ("name", "/owner/name", "./owner/name", "a/b/c", "owner/", "a--b/c", "owner/..", "owner/na me", "~/x"):
        assert not is_hub_id(name)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_id("owner/name")


def test_paths_and_addresses_stay(tmp_path: Path) -> None:
    assert public_name("/home/someone/models/llama/") == "llama"
    assert public_name("C:\\Users\\someone\\llama") == "llama"
    assert public_name("builtin:tiny") == "builtin:tiny"
    config = FedTuneConfig(
        model=ModelConfig(base="/home/someone/llama"),
        data=DataConfig(source="~/wards/notes.jsonl", instruction=f"{{input}} {TOKEN}"),
        federation=FederationConfig(
            engine="superlink",
            superlink="10.0.0.7:9093",
            superlink_ca="/home/someone/ca.pem",
            ray_address="10.0.0.8:6379",
        ),
    )
    text = json.dumps(public_config(config))
    for private in ("someone", "wards", "10.0.0.7", "10.0.0.8", TOKEN):
        assert private not in text
    assert FedTuneConfig.model_validate_json(text).model.base == "llama"
