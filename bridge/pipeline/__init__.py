"""source → stream: recover, snapshot, stream, checkpoint, confirm. The only place that joins the two."""
