"""PostgreSQL changes as a replayable JetStream log, and search indexes built from it."""

__version__ = "0.1.0"
