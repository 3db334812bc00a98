"""JetStream: the log itself. For applications: `events`, and what it gives (docs/consumers.md)."""

from bridge.event import Event, Position, Ref
from bridge.stream.consumer import Log, events
from bridge.stream.items import Item, Transaction

__all__ = ["Event", "Item", "Log", "Position", "Ref", "Transaction", "events"]
