"""One method's way down beside another's way up: a run's `downlink` writes the model that its method broadcasts."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fedlib.core.plan import State
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer


@dataclass(frozen=True)
class Downlink:
    """The server keeps its own model, and broadcasts it as another method writes it.

    Clients train from what they read, and the server adds their updates to the model that it kept. Evaluated is what
    clients would read: nobody but the server has the other.
    """

    writer: ModuleType
    hyper: Any

    def write_model(self, model: State, task: Task) -> bytes:
        return bytes(self.writer.write_model(model, self.hyper, task))

    def read_model(self, data: Buffer | memoryview, task: Task) -> State:
        found: State = self.writer.read_model(data, self.hyper, task)
        return found

    def received(self, model: State, task: Task) -> State:
        """The tensors that may change, as clients read them."""
        return self.read_model(self.write_model({name: model[name] for name in task.tensors}, task), task)
