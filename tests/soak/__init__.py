"""A soak: everything at once for minutes or hours, with faults, and a comparison after each lap.

`make soak MINUTES=60`, or `python -m tests.soak --minutes 60 --seed 7`. One database is written to all the time; a
bridge behind two proxies logs it, two index readers keep three indexes of it, rebuilds and snapshots are asked for in
between, and faults of both crash suites (tests/crash, tests/crash_index) happen, several at a time. About every
minute and a half the writers and the faults rest, and what the log and the indexes hold is compared with the tables.

In the first third of the time processes are killed as well. Afterwards bridge and readers stay up, whatever happens to
all others: from there on it is asked whether they grow (memory, descriptors, threads, connections to PostgreSQL), and
whether consumers and objects are left behind.

    load       what is in the database, and what writes to it
    world      what it happens to: the worlds of both suites, with one bridge between them
    laps       a lap: load and faults, rest, comparison
    log        the log's side of a comparison, as it goes on from lap to lap
    leaks      what a process holds at rest, and whether that has grown
    report     what is told at the end
"""
