"""A ClientApp whose training is arithmetic that can be checked by hand, for tests of the loop around it.

Client p adds p + 1 to every value of the adapter and reports p + 1 examples and a loss of 10 * p + round.
"""

from collections.abc import Callable

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedtune.protocol.arrays import decode, encode
from fedtune.protocol.messages import ARRAYS, CONFIG, METRICS

SHAPES = {"model.lora_A.weight": (2, 3), "model.lora_B.weight": (3, 2)}

Tamper = Callable[[int, int, RecordDict], RecordDict | None]


def client_app(tamper: Tamper | None = None, dtype: str = "float32", rows: int | None = None) -> ClientApp:
    """Return the app; `tamper(partition, round, content)` may change, replace or (None) withhold a reply's content."""
    app = ClientApp()

    @app.query()
    def describe(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        metrics = MetricRecord({"partition-id": partition, "rows": rows or partition + 1})
        return Message(RecordDict({METRICS: metrics}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        server_round = int(message.content[CONFIG]["server-round"])  # type: ignore[index,arg-type]
        tensors = decode(message.content.array_records[ARRAYS], SHAPES, dtype)  # type: ignore[arg-type]
        arrays = encode({name: tensor + partition + 1 for name, tensor in tensors.items()}, dtype)  # type: ignore[arg-type]
        metrics = MetricRecord(
            {
                "server-round": server_round,
                "num-examples": partition + 1,
                "train-loss": 10.0 * partition + server_round,
                "tokens": 100,
                "seconds": 0.5,
            }
        )
        content = RecordDict({ARRAYS: arrays, METRICS: metrics})
        if tamper is not None:
            changed = tamper(partition, server_round, content)
            if changed is None:
                raise RuntimeError("secret: hunter2 in /home/someone/data.csv")
            content = changed
        return Message(content, reply_to=message)

    return app
