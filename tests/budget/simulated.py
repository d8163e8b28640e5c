"""A simulated exchange: the real loop, messages and ledger around clients that train nothing, for adapters of any shapes."""

import random
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedtune.budget.ledger import Entry, read_ledger
from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import Shapes
from fedtune.federation.engines.in_process import InProcessGrid
from fedtune.federation.rounds import Rounds
from fedtune.protocol.arrays import decode, encode
from fedtune.protocol.messages import ARRAYS, CONFIG, METRICS
from fedtune.runs.atomic import write_json
from fedtune.runs.directory import RunDirectory

ROWS = 5000


class Faults:
    """What goes wrong, by (partition, round): "error", "refused" or "killed" (the whole process, that is)."""

    def __init__(self, **kinds: set[tuple[int, int]]) -> None:
        self.kinds = kinds

    def of(self, partition: int, server_round: int) -> str:
        return next((kind for kind, places in self.kinds.items() if (partition, server_round) in places), "")


class KilledError(BaseException):
    """Ends the loop as SIGKILL would: nothing catches it."""


def client_app(config: FedTuneConfig, shapes: Shapes, faults: Faults) -> ClientApp:
    """Return an app that sends the adapter back with metrics named as the real client names them."""
    app = ClientApp()

    @app.query()
    def describe(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        metrics = MetricRecord({"partition-id": partition, "rows": ROWS})
        return Message(RecordDict({METRICS: metrics}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        orders = message.content[CONFIG]
        assert isinstance(orders, ConfigRecord)
        server_round = int(orders["server-round"])  # type: ignore[arg-type]
        fault = faults.of(partition, server_round)
        if fault == "killed":
            raise KilledError
        if fault == "error":
            raise RuntimeError
        received = config.strategy.down_shapes(
            config, shapes, server_round, partition, int(orders.get("offset-rank", 0))
        )  # type: ignore[arg-type]
        decode(message.content.array_records[ARRAYS], received, config.down_format)
        sent = {
            name: torch.zeros(shape)
            for name, shape in config.strategy.up_shapes(config, shapes, server_round, partition).items()
        }
        chance = random.Random(f"{partition} {server_round}")
        steps = chance.randint(1, config.training.max_steps)
        rows = steps * config.training.rows_per_step
        tokens = chance.randint(rows, rows * config.training.sequence_length)
        metrics = MetricRecord(
            {
                "server-round": server_round,
                "num-examples": ROWS,
                "train-loss": float("nan") if fault == "refused" else chance.random(),
                "losses": [chance.random() for _ in range(steps)],
                "rows": rows,
                "tokens": tokens,
                "response-tokens": tokens // 2 + 1,
                "seconds": chance.random(),
            }
        )
        reply = encode(sent, config.up_format)
        return Message(RecordDict({ARRAYS: reply, METRICS: metrics}), reply_to=message)

    return app


def exchange(folder: Path, config: FedTuneConfig, shapes: Shapes, faults: Faults | None = None) -> list[Entry]:
    """Run all rounds of `config` with an adapter of `shapes` in a run directory; return what its ledger holds."""
    folder.mkdir(exist_ok=True)
    run = RunDirectory(folder)
    write_json(run.config_file, config.model_dump(mode="json"))
    app = client_app(config, shapes, faults or Faults())
    Rounds(
        InProcessGrid(app, config.federation.clients, {}),
        config,
        run,
        initial={name: torch.zeros(shape) for name, shape in shapes.items()},
        target_modules=["q_proj"],
        revision=None,
    ).run_rounds()
    return read_ledger(run.ledger_file)
