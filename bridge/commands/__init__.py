"""Commands of `bridge` that have a module of their own; `cli` has the others, and adds these."""
