"""Kill, stop and cut everything at random under load, and compare the stream with the tables.

`make crash SEEDS=n` runs n scenarios. A seed chooses the load, `synchronous_commit`, the publisher, how long PostgreSQL
is held back, where it begins (the start, the snapshot, a failpoint of the snapshot, the stream) and one to six faults,
one after another or two at a time on different parts. tests/oracle.py then compares every row of every table, every
change with PostgreSQL's own decoding (each once, in commit order), sequences, positions and transactions' ends, and
the scenario the last checkpoint with the stream and with what PostgreSQL was told. `WHAT=index` is tests/crash_index,
`WHAT=altering` tests/altering.

| part       | fault             | what happens |
|------------|-------------------|--------------|
| bridge     | kill_bridge       | SIGKILL at any moment, and a start soon after |
|            | end_bridge        | SIGTERM must end it with 0, and a start soon after |
|            | pause_bridge      | SIGSTOP, SIGCONT up to 3 s later |
|            | kill_while_refused | SIGKILL while the stream takes no messages, but the state bucket does |
|            | kill_and_send_late | SIGKILL; what it had sent arrives when its successor is at work |
|            | kill_and_send_between | SIGKILL; what it had sent arrives when its successor has read the stream's end |
|            | kill_at_failpoint | SIGKILL to itself at the nth time at a line of bridge/failpoints.py |
|            | stop_at_failpoint | SIGSTOP there, SIGCONT up to 1.5 s later |
|            | cut_at_failpoint  | all its connections break there |
| broker     | kill_broker       | SIGKILL of nats-server, which is away for up to 1 s |
|            | restart_broker    | its orderly stop and start |
|            | pause_broker      | SIGSTOP for up to 7 s: longer than an answer is waited for |
|            | forget_last_second | as a power failure without `sync_interval: always`: acked messages are gone |
|            | refuse_messages   | the stream takes no messages for up to 2 s, as if it were full |
| PostgreSQL | crash_postgres    | an immediate stop: an asynchronous commit that it undoes must not be in the stream |
|            | kill_postmaster   | SIGKILL of the postmaster |
|            | restart_postgres  | a fast stop, which must not be held up, and a start |
|            | pause_postmaster  | SIGSTOP for up to 3 s: new connections hang |
|            | pause_walsender   | SIGSTOP of the walsender for up to 3 s |
|            | end_walsender     | pg_terminate_backend |
| network    | cut               | one to three resets of the connections to one server |
|            | refuse            | a reset, and new connections are refused for up to 1.5 s |
|            | hold              | nothing passes for up to 2.5 s |
|            | delay             | each piece of bytes waits for up to 0.3 s |
|            | throttle          | 5 kB to 500 kB a second pass |
|            | strand            | half-open, in one direction or both, until a reset up to 3 s later |
"""
