"""Fuzzing: bytes from outside, changed at random, against every parser that reads them.

    targets.py   the registry, and what each target promises; source.py, stream.py, index.py, settings.py hold them
    mutate.py    changes of bytes
    fuzzing.py   the loop: what had a new outcome is kept, and changed further
    __main__.py  `make fuzz`: minutes of it, with inputs that broke something written to files

A few thousand rounds of each, always the same ones, are among the unit tests (tests/unit/test_fuzz_targets.py).
"""
