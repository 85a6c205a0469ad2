"""Federated averaging by Flower: clients that train on their own text, and a server that averages their weights."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from texts import CLIENTS, Reader
from training import bits_per_byte, new_model, shared, train

from seqarch import LanguageModel

OWN = "own"
"""Where a client keeps weights that it does not send."""

client = ClientApp()


def name_of(context: Context) -> str:
    return list(CLIENTS)[int(context.node_config["partition-id"])]


def received(message: Message, context: Context) -> LanguageModel:
    """A client's model: what the server has sent, and what the client has kept for itself."""
    model = new_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
    if OWN in context.state:
        model.load_state_dict(context.state[OWN].to_torch_state_dict(), strict=False)
    return model


@client.train()
def train_here(message: Message, context: Context) -> Message:
    """A round on the client's own text, which goes on where the round before ended, but from no state."""
    name, config = name_of(context), message.content["config"]
    steps = steps_of(name, int(config["rounds-per-pass"]))
    reader, model = Reader(name, at=steps * (int(config["server-round"]) - 1)), received(message, context)
    loss = train(model, [reader] * steps)
    sent = shared(model, bool(config["own-norms"]))
    kept = {key: tensor for key, tensor in model.state_dict().items() if key not in sent}
    if kept:
        context.state[OWN] = ArrayRecord(kept)
    metrics = MetricRecord({"bits": loss, "num-examples": steps * reader.rows.shape[0] * Reader.PIECE})
    return Message(content=RecordDict({"arrays": ArrayRecord(sent), "metrics": metrics}), reply_to=message)


def steps_of(name: str, rounds_per_pass: int) -> int:
    """The pieces that a client reads in a round, so that so many rounds read its text once."""
    return -(-Reader(name).pieces // rounds_per_pass)


@client.evaluate()
def test_here(message: Message, context: Context) -> Message:
    """Bits per byte on the end of the client's own text."""
    number = int(context.node_config["partition-id"])
    bits = bits_per_byte(received(message, context), name_of(context))
    metrics = MetricRecord({"client": number, "bits": bits, "num-examples": 1})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


def apart(replies: Iterable[RecordDict], _: str) -> MetricRecord:
    """The result of each client by its name, where Flower would average them."""
    found = [reply["metrics"] for reply in replies]
    return MetricRecord({list(CLIENTS)[int(each["client"])]: each["bits"] for each in found})


class OneProcess(Grid):
    """Clients in the process of the server, one after another, in place of Flower's network; what is sent is counted.

    Attributes:
        sent: bytes of all arrays that went to clients and came from them.
    """

    def __init__(self, app: ClientApp, clients: int):
        self.app, self.sent = app, 0
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0  # as Flower sets it in a server
        self.replies: dict[str, Message] = {}
        self.contexts = {
            number + 1: Context(1, number + 1, {"partition-id": number}, RecordDict(), {}) for number in range(clients)
        }

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            reply = self.app(message, self.contexts[message.metadata.dst_node_id])
            self.sent += array_bytes(message) + array_bytes(reply)
            names.append(f"reply {len(self.replies)}")
            self.replies[names[-1]] = reply
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(name) for name in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def array_bytes(message: Message) -> int:
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())


def federated(rounds: int, rounds_per_pass: int, own_norms: bool) -> tuple[dict[str, float], int]:
    """Bits per byte of each client after so many rounds, and the bytes that were sent for training.

    The server takes the mean of the clients' weights, each by the bytes that it has read (McMahan et al. 2017,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1).
    """
    grid = OneProcess(client, len(CLIENTS))
    strategy = FedAvg(min_available_nodes=len(CLIENTS), fraction_evaluate=0.0, evaluate_metrics_aggr_fn=apart)
    config = ConfigRecord({"rounds-per-pass": rounds_per_pass, "own-norms": own_norms})
    first = ArrayRecord(shared(new_model(), own_norms))
    arrays = strategy.start(grid, first, num_rounds=rounds, train_config=config).arrays
    sent, strategy.fraction_evaluate = grid.sent, 1.0
    asked = strategy.configure_evaluate(rounds, arrays, ConfigRecord(), grid)
    found = strategy.aggregate_evaluate(rounds, grid.send_and_receive(asked))
    return dict(found), sent
