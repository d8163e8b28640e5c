"""The ClientApp: says how many rows it has, and trains the adapter that it is sent on them.

What leaves a client is the adapter and named numbers. An error leaves as the text of a ClientError, which holds no data and
no paths, or as the bare name of the exception's class.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedtune.budget.count import CODECS, Shapes
from fedtune.budget.traffic import OFFSET, down_shapes, is_trained, up_shapes
from fedtune.config.schema import FedTuneConfig
from fedtune.data.order import steps_of_round
from fedtune.errors import ClientError, FedTuneError
from fedtune.federation.client_state import ClientState
from fedtune.federation.events import StepDone, tell
from fedtune.federation.node import ERRORS_PASS, NODE_KEY, error_text
from fedtune.federation.privacy import new_key, noisy_average, public_metrics, with_release
from fedtune.federation.screen import ARRAYS, CONFIG, METRICS
from fedtune.federation.strategies.scaffold import Control
from fedtune.federation.wire import WireError, decode, encode
from fedtune.federation.workspace import workspace_of_client
from fedtune.models.adapter import AdaptedModel, AdapterTensors, initial_tensors
from fedtune.training.local import StepReport, train_locally

app = ClientApp()
log = logging.getLogger(__name__)

NOISE_KEY = "noise_key"
"""In a client's state: the secret of its local noise, a number a byte."""
RELEASES = "releases"
"""In a client's state: what it has let out under local privacy, as `with_release` returns it."""
OWED = "owed."
"""Prefix of the rounding errors that a client's next reply makes good."""


Handler = Callable[[Message, Context], Message]


def discreet(handler: Handler) -> Handler:
    """Let no exception's text leave a client, which Flower would send to the server as it is.

    A data owner's node, and the engines of one machine, see to that themselves.
    """

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as error:
            if {NODE_KEY, ERRORS_PASS} & context.node_config.keys():
                raise
            log.debug("the client failed", exc_info=True)
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, error_text(error)), reply_to=message)

    return answer


@app.query()
@discreet
def describe(message: Message, context: Context) -> Message:
    """Reply with the client's partition id and its number of rows."""
    partition = int(context.node_config["partition-id"])
    workspace = workspace_of_client(context)
    # Under local privacy a number of rows is data like any other; every client weighs 1.
    rows = 1 if workspace.config.privacy.mode == "local" else len(workspace.rows(partition))
    metrics = MetricRecord({"partition-id": partition, "rows": rows})
    return Message(RecordDict({METRICS: metrics}), reply_to=message)


@app.train()
@discreet
def train(message: Message, context: Context) -> Message:
    """Train the adapter in the message for one round and reply with what of it travels."""
    partition = int(context.node_config["partition-id"])
    workspace = workspace_of_client(context)
    config, adapted, rows = workspace.config, workspace.adapted, workspace.rows(partition)
    orders, arrays = message.content[CONFIG], message.content[ARRAYS]
    if not isinstance(orders, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise ClientError("The server's message lacks its arrays or its config.")
    server_round = int(orders["server-round"])  # type: ignore[arg-type]

    state = ClientState(context, partition)
    kept = state.before(server_round)
    received = _received(arrays, config, adapted.shapes, orders, partition)
    start = _start(received, adapted, config, server_round)
    control = Control.of(received, kept) if config.strategy.name == "scaffold" else None
    adapted.load(start)
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

    adapted.set_offset({name: tensor for name, tensor in received.items() if OFFSET in name})
    try:
        result = train_locally(
            adapted,
            rows,
            steps,
            config.training,
            learning_rate=float(orders["learning-rate"]),  # type: ignore[arg-type]
            seed=(config.seed, server_round, partition),
            proximal_mu=float(orders.get("proximal-mu", 0.0)),  # type: ignore[arg-type]
            trained={name for name in adapted.shapes if is_trained(config.strategy, name, server_round)},
            adjust=control,
            gradient_checkpointing=config.model.gradient_checkpointing,
            on_step=on_step,
            timeout_s=config.federation.client_timeout_s,
        )
    finally:
        adapted.set_offset({})
    try:
        adapted.check_base(f"after client {partition} trained")
    except FedTuneError as error:
        raise ClientError(error.message) from error
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
    outcome = adapted.tensors()
    if control is not None:
        outcome |= control.changes()
        kept |= control.kept()
    if config.privacy.mode == "local":
        outcome, secrets = _privatised(outcome, start, config, server_round, adapted.shapes, partition, state.newest())
        metrics = MetricRecord(dict(public_metrics(server_round)))
        kept |= secrets
    reply, owed = _reply(outcome, start, config, up_shapes(config, adapted.shapes, server_round, partition), kept)
    if kept | owed:
        state.keep(server_round, kept | owed)
    return Message(RecordDict({ARRAYS: reply, METRICS: metrics}), reply_to=message)


def _received(
    arrays: ArrayRecord, config: FedTuneConfig, shapes: Shapes, orders: ConfigRecord, partition: int
) -> AdapterTensors:
    """Return the message's tensors.

    Raises:
        ClientError: they are not those that the config says.
    """
    server_round, offset_rank = int(orders["server-round"]), int(orders.get("offset-rank", 0))  # type: ignore[arg-type]
    expected = down_shapes(config, shapes, server_round, partition, offset_rank)
    try:
        return decode(arrays, expected, config.down_format)
    except WireError as error:
        raise ClientError(f"The server's message cannot be read: {error}.") from error


def _start(received: AdapterTensors, adapted: AdaptedModel, config: FedTuneConfig, server_round: int) -> AdapterTensors:
    """Return the whole adapter that training starts from.

    What did not travel follows from the seed; an adapter of a lower rank is filled up with zeros, whose gradients are zero.
    """
    missing = [name for name in adapted.shapes if name not in received]
    fresh = config.strategy.name == "flora"
    own = initial_tensors(adapted, config.seed, server_round if fresh else 0) if missing else {}
    return {
        name: _filled(received[name], shape) if name in received else own[name]
        for name, shape in adapted.shapes.items()
    }


def _privatised(
    outcome: AdapterTensors,
    start: AdapterTensors,
    config: FedTuneConfig,
    server_round: int,
    shapes: Shapes,
    partition: int,
    newest: AdapterTensors,
) -> tuple[AdapterTensors, AdapterTensors]:
    """Return the clipped and noisy adapter that a client lets out under local privacy, and what it keeps to itself.

    Key and releases are those of the last answer, also where a round is repeated: another key would be another release of the
    same update.

    Raises:
        ClientError: the client has spent its privacy budget. The server's own count is not relied on.
    """
    key = bytes(int(value) for value in newest[NOISE_KEY]) if NOISE_KEY in newest else new_key()
    sent = {name: start[name] for name in up_shapes(config, shapes, server_round, partition)}
    private = noisy_average(
        sent,
        {partition: {name: outcome[name] for name in sent}},
        config.privacy,
        asked=1,
        key=key,
        server_round=server_round,
    )
    releases = with_release(newest.get(RELEASES), private, config)
    return {**outcome, **private}, {NOISE_KEY: torch.tensor(list(key), dtype=torch.float32), RELEASES: releases}


def _filled(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) == shape:
        return tensor
    filled = torch.zeros(shape)
    filled[tuple(slice(size) for size in tensor.shape)] = tensor
    return filled


def _reply(
    outcome: AdapterTensors, start: AdapterTensors, config: FedTuneConfig, shapes: Shapes, kept: AdapterTensors
) -> tuple[ArrayRecord, AdapterTensors]:
    """Return the reply's arrays, and what rounding still owes to the next reply.

    A packed reply holds differences from `start`, to which the error of the client's last reply is added: what is lost in one
    round is made good in the next (error feedback, https://arxiv.org/abs/1809.07599).
    """
    sent = {name: outcome[name][tuple(slice(size) for size in shape)] for name, shape in shapes.items()}
    form = config.up_format
    if form not in CODECS:
        return encode(sent, form), {}
    for name, tensor in sent.items():
        if name in start:
            tensor = tensor - start[name][tuple(slice(size) for size in tensor.shape)]
        owed = kept.get(OWED + name)
        sent[name] = tensor if owed is None or owed.shape != tensor.shape else tensor + owed
    record = encode(sent, form)
    read = decode(record, shapes, form)
    return record, {OWED + name: tensor - read[name] for name, tensor in sent.items()}
