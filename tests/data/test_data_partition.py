"""The split among the clients: right sizes, right errors, and the same on every machine."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from flwr_datasets import FederatedDataset, federated_dataset
from flwr_datasets.partitioner import IidPartitioner

from fedtune.config.schema import FedTuneConfig
from fedtune.data.partition import load_partitions
from fedtune.errors import ConfigError

ROOT = Path(__file__).parents[2]
MEDQUAD = ROOT.parent / "shared/data/train/medquad.jsonl"


def config(source: Path, clients: int, seed: int = 42, **data: Any) -> FedTuneConfig:
    return FedTuneConfig.model_validate({
        "seed": seed, "data": {"source": str(source), **data}, "federation": {"clients": clients}
    })  # fmt: skip


@pytest.fixture
def wards(tmp_path: Path) -> Path:
    """24 rows: ward a has 12, b 8, c 4."""
    path = tmp_path / "wards.jsonl"
    rows = [{"instruction": f"q{i}", "output": f"a{i}", "ward": "aaabbc"[i % 6]} for i in range(24)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def drawn(partitions: Any) -> list[list[str]]:
    return [[row["instruction"] for row in partitions.rows(i)] for i in range(len(partitions.sizes))]


def test_iid_is_flwr_datasets_own(wards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(federated_dataset, "event", lambda *_: None)  # telemetry
    reference = FederatedDataset(
        dataset=str(wards.parent), partitioners={"train": IidPartitioner(num_partitions=5)}, seed=7
    )
    ours = load_partitions(config(wards, 5, seed=7))
    assert ours.sizes == (5, 5, 5, 5, 4)
    assert ours.names == ("0", "1", "2", "3", "4")
    assert [ours.rows(i).to_list() for i in range(5)] == [reference.load_partition(i).to_list() for i in range(5)]
    assert [(line.skew, line.top_label) for line in ours.table()] == [(None, None)] * 5


def test_natural_clients_are_the_columns_values(wards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    partitions = load_partitions(config(wards, 3, partitioner="natural", partition_by="ward"))
    assert partitions.names == ("a", "b", "c")
    assert partitions.sizes == (12, 8, 4)
    for i, name in enumerate(partitions.names):
        assert set(partitions.rows(i)["ward"]) == {name}
    # A client with one label only is as far from the whole as the others' share: 1 - 12/24, 1 - 8/24, 1 - 4/24.
    table = partitions.table()
    assert [line.skew for line in table] == pytest.approx([1 / 2, 2 / 3, 5 / 6])
    assert [(line.partition, line.name, line.rows, line.top_label, line.top_share) for line in table] == [
        (0, "a", 12, "a", 1.0), (1, "b", 8, "b", 1.0), (2, "c", 4, "c", 1.0)
    ]  # fmt: skip
    assert capfd.readouterr() == ("", "")


def test_skew_by_hand(tmp_path: Path) -> None:
    # Client 0 has x, x, y, z; client 1 has y, y: the whole is x 2/6, y 3/6, z 1/6.
    (tmp_path / "a.csv").write_text("instruction,output,label\n1,1,x\n2,2,x\n3,3,y\n4,4,z\n")
    (tmp_path / "b.csv").write_text("instruction,output,label\n5,5,y\n6,6,y\n")
    partitions = load_partitions(config(tmp_path, 2, partitioner="files", partition_by="label"))
    assert partitions.names == ("a.csv", "b.csv")
    assert drawn(partitions) == [["1", "2", "3", "4"], ["5", "6"]]
    first, second = partitions.table()
    assert first.skew == pytest.approx((abs(1 / 2 - 1 / 3) + abs(1 / 4 - 1 / 2) + abs(1 / 4 - 1 / 6)) / 2)
    assert (first.top_label, first.top_share) == ("x", 0.5)
    assert second.skew == pytest.approx(1 / 2)


def test_dirichlet_covers_every_row_once(wards: Path) -> None:
    partitions = load_partitions(config(wards, 4, partitioner="dirichlet", partition_by="ward", alpha=1.0))
    assert sorted(chain(*drawn(partitions))) == sorted(f"q{i}" for i in range(24))
    assert all(partitions.sizes)
    even = load_partitions(config(wards, 4, partitioner="dirichlet", partition_by="ward", alpha=1e6))
    assert max(line.skew or 0 for line in even.table()) < max(line.skew or 0 for line in partitions.table())


@pytest.mark.parametrize(
    ("clients", "data", "said"),
    [
        (25, {}, "the data has 24 rows: --set federation.clients=24"),
        (7, {"partitioner": "natural", "partition_by": "ward"}, "3 values of 'ward': --set federation.clients=3"),
        (3, {"partitioner": "natural", "partition_by": "wards"}, "no column 'wards'.*did you mean ward"),
        (3, {"partitioner": "dirichlet", "partition_by": "wrd"}, "no column 'wrd'.*did you mean ward"),
        (24, {"partitioner": "dirichlet", "partition_by": "ward", "alpha": 0.01}, "data.alpha: 0.01 leaves one of 24"),
        (3, {"partitioner": "files"}, "files needs a folder"),
    ],
)
def test_what_does_not_fit_is_refused(wards: Path, clients: int, data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_partitions(config(wards, clients, **data))


def test_files_and_empty_values_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"output": "1", "ward": "a"}\n{"output": "2"}\n')
    with pytest.raises(ConfigError, match=r"the folder has 1 files: --set federation\.clients=1"):
        load_partitions(config(tmp_path, 2, partitioner="files"))
    with pytest.raises(ConfigError, match="1 rows have no single value of 'ward'"):
        load_partitions(config(tmp_path, 1, partitioner="natural", partition_by="ward"))


SCRIPT = """
import json, sys
from fedtune.config.schema import FedTuneConfig
from fedtune.data.partition import load_partitions
found = []
for text in sys.argv[1:]:
    partitions = load_partitions(FedTuneConfig.model_validate_json(text))
    found.append([[row["instruction"] for row in partitions.rows(i)] for i in range(len(partitions.sizes))])
print(json.dumps(found))
"""


def test_same_config_same_rows_in_every_process(wards: Path, tmp_path: Path) -> None:
    configs = [
        config(wards, 4),
        config(wards, 3, partitioner="natural", partition_by="ward"),
        config(wards, 4, partitioner="dirichlet", partition_by="ward", alpha=1.0),
    ]
    outputs = []
    for hash_seed in ("1", "2"):
        home = tmp_path / hash_seed
        home.mkdir()
        process = subprocess.run(
            [sys.executable, "-W", "error", "-c", SCRIPT, *(c.model_dump_json() for c in configs)],
            env={"PYTHONHASHSEED": hash_seed, "HF_HOME": str(home), "HOME": str(home), "TMPDIR": str(home),
                 "MPLCONFIGDIR": str(tmp_path), "PATH": os.environ["PATH"]},
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert process.stderr == ""
        assert not [path for path in home.rglob("*") if path.is_file()], "files were written"
        outputs.append(json.loads(process.stdout))
    assert outputs[0] == outputs[1] == [drawn(load_partitions(c)) for c in configs]
    other = drawn(load_partitions(config(wards, 4, seed=43)))
    assert other != outputs[0][0]


@pytest.mark.skipif(not MEDQUAD.is_file(), reason="the real data is not here")
def test_real_data_splits_evenly() -> None:
    partitions = load_partitions(config(MEDQUAD, 20, instruction="{input}"))
    assert partitions.sizes == (400,) * 20
    questions = {(row["input"], row["output"]) for i in range(20) for row in partitions.rows(i)}
    lines = MEDQUAD.read_text().splitlines()
    assert questions == {(row["input"], row["output"]) for row in map(json.loads, lines)}
