"""The ClientApp: says how many rows it has, and trains the adapter that it is sent on them.

What leaves a client is the adapter and named numbers. An error leaves as the text of a ClientError, which holds no data and
no paths, or as the bare name of the exception's class.
"""

from __future__ import annotations

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedtune.data.order import steps_of_round
from fedtune.errors import ClientError
from fedtune.federation.events import StepDone, tell
from fedtune.federation.screen import ARRAYS, CONFIG, METRICS
from fedtune.federation.wire import decode, encode
from fedtune.federation.workspace import config_json_of, workspace_of
from fedtune.training.local import StepReport, train_locally

app = ClientApp()


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Reply with the client's partition id and its number of rows."""
    partition = int(context.node_config["partition-id"])
    rows = workspace_of(config_json_of(context)).rows(partition)
    metrics = MetricRecord({"partition-id": partition, "rows": len(rows)})
    return Message(RecordDict({METRICS: metrics}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the adapter in the message for one round and reply with it, in the wire dtype."""
    partition = int(context.node_config["partition-id"])
    workspace = workspace_of(config_json_of(context))
    config, adapted, rows = workspace.config, workspace.adapted, workspace.rows(partition)
    orders, arrays = message.content[CONFIG], message.content[ARRAYS]
    if not isinstance(orders, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise ClientError("The server's message lacks its arrays or its config.")
    server_round = int(orders["server-round"])  # type: ignore[arg-type]

    dtype = config.communication.wire_dtype
    adapted.load(decode(arrays, adapted.shapes, dtype))
    steps = steps_of_round(
        len(rows),
        config.training,
        seed=config.seed,
        partition=partition,
        server_round=server_round,
        reshuffle=config.data.reshuffle,
    )

    def on_step(report: StepReport) -> None:
        tell(StepDone(partition, report.step, len(steps), report.loss, report.tokens, report.seconds))

    result = train_locally(
        adapted,
        rows,
        steps,
        config.training,
        learning_rate=float(orders["learning-rate"]),  # type: ignore[arg-type]
        seed=(config.seed, server_round, partition),
        proximal_mu=float(orders.get("proximal-mu", 0.0)),  # type: ignore[arg-type]
        gradient_checkpointing=config.model.gradient_checkpointing,
        on_step=on_step,
        timeout_s=config.federation.client_timeout_s,
    )
    metrics = MetricRecord(
        {
            "server-round": server_round,
            "num-examples": len(rows),
            "train-loss": sum(result.losses) / len(result.losses),
            "losses": list(result.losses),
            "rows": result.rows,
            "tokens": result.tokens,
            "response-tokens": result.response_tokens,
            "seconds": result.seconds,
        }
    )
    return Message(RecordDict({ARRAYS: encode(adapted.tensors(), dtype), METRICS: metrics}), reply_to=message)
