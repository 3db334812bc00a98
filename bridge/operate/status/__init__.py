"""How everything is: read from PostgreSQL, NATS and the engines, once or each second, and what follows from it."""
