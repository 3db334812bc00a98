"""The bridge over HTTP: the page, health, readiness, metrics, and what keeps hostile clients from harm."""
